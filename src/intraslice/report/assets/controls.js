// Drawing the figures in sight, and everything that can be pressed.

const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function draw(figure) {
  const { chart, ...fields } = figure.dataset;
  const sparsity = figure.closest("section").querySelector(".chosen input:checked")?.value;
  CHARTS[chart](figure, { model: Number(figure.closest("article").dataset.model), sparsity, ...fields });
  if (figure.querySelector("details").open) fillTable(figure);
}

function fillTable(figure) {
  const [head, ...rows] = figure.table;
  const names = head.map((text) => `<th scope="col">${escapeText(text)}</th>`).join("");
  const body = rows.map((row) => `<tr>${row.map((text) => `<td>${escapeText(text)}</td>`).join("")}</tr>`).join("");
  const title = escapeText(figure.querySelector("figcaption").textContent);
  $$(".scroll", figure).forEach((old) => old.remove());
  figure.querySelector("details").insertAdjacentHTML(
    "beforeend", `<div class="scroll" tabindex="0" role="region" aria-label="${title}"><table class="left"><thead><tr>${names}</tr></thead><tbody>${body}</tbody></table></div>`);
}

const visibleFigures = () => $$("article:not([hidden]) figure");
const drawAll = () => visibleFigures().forEach(draw);

function chooseModel(index) {
  for (const article of $$("article")) article.hidden = article.dataset.model !== String(index);
  const labels = new Set(mainCells(Number(index)).map((c) => c.label));
  for (const chip of $$(".chip")) chip.hidden = !labels.has(chip.dataset.label);
  drawAll();
}

function sortTable(table, column, button) {
  const head = button.closest("th");
  const descending = head.getAttribute("aria-sort") === "ascending";
  $$("th[aria-sort]", table).forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.cells[column];
    if (!column) return cell.textContent;
    return cell?.dataset.sort === undefined ? null : Number(cell.dataset.sort);
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  const body = table.tBodies[0];
  // What has no number stays at the end in both directions.
  const rows = [...body.rows].map((row) => [key(row), row]).sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return descending ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}

function flatten(value, prefix, into) {
  for (const [name, item] of Object.entries(value)) {
    if (Array.isArray(item)) continue;
    if (item && typeof item === "object") flatten(item, `${prefix}${name}.`, into);
    else into[prefix + name] = item;
  }
  return into;
}

function csv() {
  const rows = doc.cells.map((cell) => flatten(cell, "", {}));
  const names = [...new Set(rows.flatMap(Object.keys))];
  const quote = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return [names, ...rows.map((row) => names.map((name) => row[name] ?? ""))].map((row) => row.map((v) => quote(String(v))).join(",")).join("\r\n") + "\r\n";
}

function save(name, type, text) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function start() {
  document.body.append(tooltip);
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  for (const holder of $$("[data-swatch]")) holder.insertAdjacentHTML("afterbegin", swatch(styleOf(holder.dataset.swatch)));
  document.getElementById("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.getElementById("csv").addEventListener("click", () => save("comparison.csv", "text/csv", csv()));
  document.getElementById("json").addEventListener("click", () => save("comparison.json", "application/json", JSON.stringify(doc)));
  document.getElementById("model")?.addEventListener("change", (event) => chooseModel(event.target.value));
  for (const chip of $$(".chip")) {
    chip.addEventListener("click", () => {
      const { label } = chip.dataset;
      if (!hidden.delete(label)) hidden.add(label);
      chip.setAttribute("aria-pressed", String(!hidden.has(label)));
      drawAll();
    });
  }
  for (const table of $$("table.sortable")) {
    $$("thead button", table).forEach((button, column) => button.addEventListener("click", () => sortTable(table, column, button)));
  }
  for (const input of $$(".filter input")) {
    input.addEventListener("change", () => {
      for (const row of $$("tbody tr", input.closest("section"))) row.hidden = input.value !== "" && ![input.value, "0"].includes(row.dataset.asked);
    });
  }
  for (const input of $$(".chosen input")) {
    input.addEventListener("change", () => {
      // The other sections follow, where they have a cell of this sparsity.
      for (const other of $$(".chosen input", input.closest("article"))) if (other.value === input.value) other.checked = true;
      drawAll();
    });
  }
  $$("figure details").forEach((d) => d.addEventListener("toggle", () => d.open && fillTable(d.closest("figure"))));
  addEventListener("scroll", () => (tooltip.hidden = true), { passive: true });
  chooseModel(0);
  let before = "light";
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    setTheme("light");
  });
  addEventListener("afterprint", () => setTheme(before));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) requestAnimationFrame(drawAll);
    width = innerWidth;
  });
}

start();

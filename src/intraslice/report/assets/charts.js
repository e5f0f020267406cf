// Drawing: lines, heat maps and bars as SVG text, with one way to read them by pointer and by keyboard.

// --- scales -----------------------------------------------------------------------------------------------------

function niceStep(range, count) {
  const raw = range / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999);
}

function linearScale(low, high, from, to, count, zero) {
  if (low === high) [low, high] = [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  const pad = (high - low) * 0.05;
  low = zero && low >= 0 && low < (high - low) * 0.7 ? 0 : low - pad;
  high += pad;
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let t = Math.ceil(low / step); t * step <= high; t++) ticks.push(+(t * step).toPrecision(12));
  return { ticks, at: (v) => from + ((v - low) / (high - low)) * (to - from) };
}

function logScale(low, high, from, to, count) {
  const pad = (high / low) ** 0.05;
  const [a, b] = [Math.log10(low / pad), Math.log10(high * pad)];
  const all = (steps) => {
    const ticks = [];
    for (let e = Math.floor(a); e <= b; e++) {
      for (const m of steps) if (Math.log10(m) + e >= a && Math.log10(m) + e <= b) ticks.push(+(m * 10 ** e).toPrecision(6));
    }
    return ticks;
  };
  const choices = [[1, 1.5, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(all);
  let ticks = choices.find((t) => t.length <= count + 1) || choices.at(-1);
  ticks = ticks.filter((_, i) => i % Math.ceil(ticks.length / (count + 1)) === 0);
  return { ticks, at: (v) => from + ((Math.log10(v) - a) / (b - a)) * (to - from) };
}

const LARGE_RANGE = 5;
const TICK_ROOM = 34;
function makeScale(axis, values, from, to, count) {
  if (axis.labels) {
    const step = (to - from) / axis.labels.length;
    return { ticks: axis.labels.map((_, i) => i), at: (v) => from + step * (v + 0.5) };
  }
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const more = ((axis.span || 0) - (high - low)) / 2;
  if (more > 0) [low, high] = [low - more, high + more];
  const logarithmic = axis.log !== false && low > 0 && high / low > LARGE_RANGE;
  const scale = (logarithmic ? logScale : linearScale)(low, high, from, to, count, axis.zero);
  if (axis.ticks) {
    scale.ticks = [];
    for (const t of [...axis.ticks].sort((a, b) => a - b)) {
      if (!scale.ticks.length || scale.at(t) - scale.at(scale.ticks.at(-1)) >= TICK_ROOM) scale.ticks.push(t);
    }
  }
  return { ...scale, logarithmic };
}

// --- lines and points -------------------------------------------------------------------------------------------

// spec: { x: {title, format, tick?: format of the ticks, ticks?: where, labels?: names instead of numbers, log?,
//         span?: how much it shows at least}, y: same,
//         series: [{name, style, points: [{x, y, tip?}], scatter?: no line, faint?}], rules: [{y, name}],
//         front: [point], sparse: draw few markers }
function drawLines(figure, spec) {
  const plot = figure.querySelector(".plot");
  const width = Math.max(plot.clientWidth, 260);
  const height = Math.round(Math.min(380, Math.max(260, width * 0.56)));
  const series = spec.series.map((s) => ({
    ...s,
    points: s.points.filter((p) => isNumber(p.x) && isNumber(p.y)).sort((a, b) => a.x - b.x),
  })).filter((s) => s.points.length);
  const rules = (spec.rules || []).filter((r) => isNumber(r.y));
  figure.table = linesTable(spec, series);
  if (!series.length) return empty(plot);
  const points = series.flatMap((s) => s.points);
  const [top, bottom, right] = [26, 44, 14];
  const y = makeScale(spec.y, [...points.map((p) => p.y), ...rules.map((r) => r.y)], height - bottom, top, 6);
  const tickText = (axis, t) => (axis.tick || axis.format)(t);
  const left = 14 + 6.6 * Math.max(2, ...y.ticks.map((t) => tickText(spec.y, t).length));
  const x = makeScale(spec.x, points.map((p) => p.x), left + 6, width - right - 6, width < 420 ? 4 : 7);
  let svg = "";
  for (const t of y.ticks) {
    svg += `<line class="grid-line" x1="${left}" x2="${width - right}" y1="${y.at(t)}" y2="${y.at(t)}"/>`;
    svg += `<text class="tick" x="${left - 7}" y="${y.at(t) + 4}" text-anchor="end">${escapeText(tickText(spec.y, t))}</text>`;
  }
  for (const t of x.ticks) {
    const label = spec.x.labels ? spec.x.labels[t] : tickText(spec.x, t);
    svg += `<line class="axis" x1="${x.at(t)}" x2="${x.at(t)}" y1="${height - bottom}" y2="${height - bottom + 4}"/>`;
    svg += `<text class="tick" x="${x.at(t)}" y="${height - bottom + 17}" text-anchor="middle">${escapeText(label)}</text>`;
  }
  svg += `<line class="axis" x1="${left}" x2="${width - right}" y1="${height - bottom}" y2="${height - bottom}"/>`;
  svg += `<text class="axis-title" x="0" y="11">${escapeText(spec.y.title)}${y.logarithmic ? " (log scale)" : ""}</text>`;
  svg += `<text class="axis-title" x="${width - right}" y="${height - 5}" text-anchor="end">${escapeText(spec.x.title)}${x.logarithmic ? " (log scale)" : ""}</text>`;
  for (const r of rules) {
    svg += `<line class="rule" x1="${left}" x2="${width - right}" y1="${y.at(r.y)}" y2="${y.at(r.y)}"/>`;
    const above = y.at(r.y) > top + 16;
    svg += `<text class="rule-name" x="${width - right}" y="${y.at(r.y) + (above ? -5 : 14)}" text-anchor="end">${escapeText(r.name)}</text>`;
  }
  const front = (spec.front || []).filter((p) => isNumber(p.x) && isNumber(p.y));
  if (front.length) {
    svg += `<polyline class="front" points="${front.map((p) => `${x.at(p.x)},${y.at(p.y)}`).join(" ")}"/>`;
    svg += front.map((p) => `<circle class="front-ring" cx="${x.at(p.x)}" cy="${y.at(p.y)}" r="8.5"/>`).join("");
  }
  const targets = [];
  // Ours last, so that it lies on top.
  for (const [index, s] of [...series.entries()].sort((a, b) => Boolean(a[1].style.ours) - Boolean(b[1].style.ours))) {
    const path = s.points.map((p) => `${x.at(p.x).toFixed(1)},${y.at(p.y).toFixed(1)}`).join(" ");
    const every = spec.sparse ? Math.max(1, Math.round(s.points.length / 5)) : 1;
    const marks = s.points.filter((_, i) => (i + index) % every === 0).map((p) => marker(s.style, x.at(p.x), y.at(p.y), spec.sparse ? 3 : 4));
    const widthOfLine = s.style.ours ? 3 : s.faint ? 0.8 : 1.7;
    svg += `<g class="series" data-series="${index}"${s.faint ? ' opacity="0.45"' : ""}>`;
    if (!s.scatter) svg += `<polyline class="line" points="${path}" stroke="${s.style.colour}" stroke-width="${widthOfLine}" stroke-dasharray="${s.style.dash}"/>`;
    svg += `${s.faint ? "" : marks.join("")}</g>`;
    for (const p of s.points) {
      const lines = [`${spec.y.title}: ${spec.y.format(p.y)}`, `${spec.x.title}: ${spec.x.labels ? spec.x.labels[p.x] : spec.x.format(p.x)}`];
      targets.push({ series: index, x: x.at(p.x), y: y.at(p.y), tip: [s.name, ...lines, ...(p.tip || [])] });
    }
  }
  const names = series.filter((s) => !s.faint).map((s) => `<li>${swatch(s.style)}${escapeText(s.name)}</li>`);
  targets.sort((a, b) => a.series - b.series);
  show(figure, width, height, svg, targets, 48, names);
}

function linesTable(spec, series) {
  const name = (v) => (spec.x.labels ? spec.x.labels[v] : spec.x.format(v));
  const rows = series.flatMap((s) => s.points.map((p) => [s.name, name(p.x), spec.y.format(p.y), ...(p.tip || [])]));
  const more = Math.max(3, ...rows.map((row) => row.length)) - 3;
  return [["Series", spec.x.title, spec.y.title, ...Array(more).fill("Note")], ...rows];
}

// --- heat maps --------------------------------------------------------------------------------------------------

// spec: { rows: [name], values: [[number]], colour: (value, column) => share of the ramp, tip: (row, column, value) => lines,
//         ticks: [[column, label]], xTitle, yTitle, labelEvery, cell: height of a cell, bar: [low, high] labels }
function drawHeat(figure, spec) {
  const plot = figure.querySelector(".plot");
  const width = Math.max(plot.clientWidth, 260);
  const named = spec.rows.filter((_, r) => r % (spec.labelEvery || 1) === 0);
  const left = Math.min(width * 0.34, 12 + 6.7 * Math.max(...named.map((name) => name.length)));
  const columns = Math.max(...spec.values.map((row) => row.length));
  const [top, bottom, right] = [spec.yTitle ? 20 : 4, 38, 4];
  const [w, h] = [(width - left - right) / columns, spec.cell];
  const height = top + spec.rows.length * h + bottom;
  const gap = spec.gap || 0;
  const ramp = spec.ramp || nightRamp;
  const targets = [];
  let svg = spec.yTitle ? `<text class="axis-title" x="0" y="11">${escapeText(spec.yTitle)}</text>` : "";
  spec.values.forEach((row, r) => {
    const y = top + r * h;
    if (r % (spec.labelEvery || 1) === 0) {
      const ours = spec.ours === spec.rows[r] ? " ours" : "";
      const room = Math.floor((left - 8) / 6.7);
      const label = spec.rows[r].length > room ? `${spec.rows[r].slice(0, room - 1)}\u2026` : spec.rows[r];
      svg += `<text class="tick${ours}" x="${left - 7}" y="${y + h / 2 + 4}" text-anchor="end">${escapeText(label)}</text>`;
    }
    row.forEach((value, c) => {
      const x = left + c * w;
      const fill = isNumber(value) ? ramp(spec.colour(value, c)) : "none";
      svg += `<rect x="${x.toFixed(2)}" y="${y.toFixed(1)}" width="${(w - gap + (gap ? 0 : 0.3)).toFixed(2)}" height="${h - gap}" fill="${fill}"/>`;
      targets.push({ series: r, x: x + w / 2, y: y + h / 2, w, h, tip: spec.tip(r, c, value) });
    });
  });
  const base = top + spec.rows.length * h;
  for (const [c, label] of spec.ticks) {
    const anchor = c === 0 ? "start" : c === columns - 1 ? "end" : "middle";
    const x = left + (c + { start: 0, middle: 0.5, end: 1 }[anchor]) * w;
    svg += `<text class="tick" x="${x}" y="${base + 14}" text-anchor="${anchor}">${escapeText(label)}</text>`;
  }
  svg += `<text class="axis-title" x="${width - right}" y="${base + 32}" text-anchor="end">${escapeText(spec.xTitle)}</text>`;
  // The key starts below the row names: the title of the axis needs the right half.
  const [low, high] = spec.bar;
  const lowWidth = low.length * 7 + 4;
  for (let i = 0; i < 20; i++) svg += `<rect x="${lowWidth + i * 4}" y="${base + 23}" width="4.2" height="9" fill="${ramp(i / 19)}"/>`;
  svg += `<text class="tick" x="0" y="${base + 32}">${escapeText(low)}</text>`;
  svg += `<text class="tick" x="${lowWidth + 86}" y="${base + 32}">${escapeText(high)}</text>`;
  figure.table = [["", "", "Value"], ...targets.map((t) => t.tip)];
  show(figure, width, height, svg, targets, 0);
}

// From nearly the colour of the card to the accent, in both themes.
const accentRamp = (share) => `color-mix(in srgb, var(--ours) ${(8 + 92 * Math.max(0, Math.min(1, share))).toFixed(0)}%, var(--card))`;

// Dark to light through one order of lightness, which every kind of colour vision sees.
const RAMP = [[0, 32, 76], [37, 66, 107], [87, 92, 109], [124, 123, 120], [166, 157, 117], [211, 193, 100], [253, 231, 100]];
function nightRamp(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1);
  const i = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[i].map((a, k) => Math.round(a + (RAMP[i + 1][k] - a) * (at - i))).join(",")})`;
}

// --- bars -------------------------------------------------------------------------------------------------------

const shade = (part) => 1 - 0.28 * part;

// spec: { rows: [{name, style, parts: [{name, value}]}], format, title }
function drawBars(figure, spec) {
  const plot = figure.querySelector(".plot");
  const width = Math.max(plot.clientWidth, 260);
  const rows = spec.rows.map((r) => ({ ...r, parts: r.parts.filter((p) => isNumber(p.value)) })).filter((r) => r.parts.length);
  figure.table = [["Method", ...(rows[0] || { parts: [] }).parts.map((p) => p.name)], ...rows.map((r) => [r.name, ...r.parts.map((p) => spec.format(p.value))])];
  if (!rows.length) return empty(plot);
  const total = (r) => r.parts.reduce((sum, p) => sum + p.value, 0);
  const most = Math.max(...rows.map(total)) || 1;
  const left = Math.min(width * 0.34, 12 + 6.7 * Math.max(...rows.map((r) => r.name.length)));
  const [step, right] = [26, 12 + 6.6 * Math.max(...rows.map((r) => spec.format(total(r)).length))];
  const targets = [];
  let svg = "";
  rows.forEach((r, i) => {
    let x = left;
    const y = 4 + i * step;
    svg += `<text class="tick${r.style.ours ? " ours" : ""}" x="${left - 8}" y="${y + 14}" text-anchor="end">${escapeText(r.name)}</text>`;
    r.parts.forEach((p, k) => {
      const w = (p.value / most) * (width - left - right);
      svg += `<rect class="bar-part" x="${x}" y="${y + 2}" width="${Math.max(w, 0.5)}" height="${step - 9}" rx="1.5" fill="${r.style.colour}" opacity="${shade(k)}"/>`;
      targets.push({ series: i, x: x + w / 2, y: y + step / 2 - 2, w, h: step - 8, tip: [r.name, `${p.name}: ${spec.format(p.value)}`, `total: ${spec.format(total(r))}`] });
      x += w;
    });
    svg += `<text class="tick" x="${x + 6}" y="${y + 14}">${escapeText(spec.format(total(r)))}</text>`;
  });
  const names = rows.reduce((a, b) => (b.parts.length > a.length ? b.parts : a), []).map((p) => p.name);
  const shades = names.map((name, k) => `<li><span class="shade" style="opacity:${shade(k)}"></span>${escapeText(name)}</li>`);
  show(figure, width, rows.length * step + 8, svg, targets, 0, names.length > 1 ? shades : []);
}

// --- reading a chart --------------------------------------------------------------------------------------------

function empty(plot) {
  plot.innerHTML = '<p class="nothing">Nothing was measured for what is chosen.</p>';
}

const tooltip = document.createElement("div");
tooltip.className = "tooltip";
tooltip.setAttribute("role", "status");
tooltip.hidden = true;

function show(figure, width, height, svg, targets, reach, legend = []) {
  const plot = figure.querySelector(".plot");
  const title = figure.querySelector("figcaption").textContent;
  const label = `${title}. Chart; the arrow keys read its values, the table below has all of them.`;
  plot.innerHTML =
    `<svg viewBox="0 0 ${width} ${height.toFixed(0)}" tabindex="0" role="group" aria-label="${escapeText(label)}">` +
    `${svg}<rect class="focus-ring" visibility="hidden"/></svg>${legend.length ? `<ul class="legend">${legend.join("")}</ul>` : ""}`;
  const root = plot.querySelector("svg");
  let current = null;
  const select = (target) => {
    current = target;
    highlight(root, target, width);
  };
  const nearest = (event) => {
    const box = root.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((v) => (v * width) / box.width);
    const distance = (t) => Math.hypot(Math.max(Math.abs(t.x - x) - (t.w || 0) / 2, 0), Math.max(Math.abs(t.y - y) - (t.h || 0) / 2, 0));
    const best = targets.reduce((a, b) => (distance(b) < distance(a) ? b : a), targets[0]);
    return best && distance(best) <= reach ? best : null;
  };
  root.addEventListener("pointermove", (event) => select(nearest(event)));
  root.addEventListener("pointerdown", (event) => select(nearest(event)));
  root.addEventListener("pointerleave", () => select(null));
  root.addEventListener("blur", () => select(null));
  root.addEventListener("keydown", (event) => {
    const next = event.key === "Escape" ? null : step(targets, current, event.key);
    if (next === undefined) return;
    event.preventDefault();
    select(next);
  });
}

// Left and right walk along a series, up and down go to the next one.
function step(targets, current, key) {
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(key)) return undefined;
  if (!current) return targets[0];
  const sideways = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  const series = [...new Set(targets.map((t) => t.series))].sort((a, b) => a - b);
  const wanted = sideways ? current.series : series[series.indexOf(current.series) + sign];
  const row = targets.filter((t) => t.series === wanted);
  if (sideways) return row[row.indexOf(current) + sign] || current;
  return row.length ? row.reduce((a, b) => (Math.abs(b.x - current.x) < Math.abs(a.x - current.x) ? b : a)) : current;
}

function highlight(root, target, width) {
  const ring = root.querySelector(".focus-ring");
  root.classList.toggle("reading", Boolean(target));
  for (const group of root.querySelectorAll(".series")) {
    group.classList.toggle("hot", Boolean(target) && Number(group.dataset.series) === target.series);
  }
  ring.setAttribute("visibility", target ? "visible" : "hidden");
  tooltip.hidden = !target;
  if (!target) return;
  const [w, h] = [target.w || 15, target.h || 15];
  Object.entries({ x: target.x - w / 2, y: target.y - h / 2, width: w, height: h, rx: target.w ? 1 : 8 }).forEach(([k, v]) => ring.setAttribute(k, v));
  tooltip.replaceChildren(...target.tip.map((line, i) => Object.assign(document.createElement(i ? "span" : "b"), { textContent: line })));
  const box = root.getBoundingClientRect();
  const zoom = box.width / width;
  const [x, y] = [box.left + target.x * zoom, box.top + target.y * zoom];
  const own = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.max(6, Math.min(x - own.width / 2, document.documentElement.clientWidth - own.width - 6))}px`;
  tooltip.style.top = `${y - own.height - 14 > 6 ? y - own.height - 14 : y + 16}px`;
}

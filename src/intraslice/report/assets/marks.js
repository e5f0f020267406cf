"use strict";
// How numbers are written and how a series looks. Colours are CSS variables: a change of theme needs no new drawing.

const DASH = "\u2013";
const SHAPES = ["square", "triangle", "diamond", "down", "cross", "plus", "hexagon"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2", "12 4", "4 4"];
const COLOURS = 8;

const escapeText = (text) =>
  String(text).replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
// Made once: a formatter takes far longer to make than to use.
const fixed = [0, 1, 2].map((digits) => new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const fourDigits = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 4 });
const grouped = (value, digits) => fixed[digits].format(value);

const format = {
  plain: (v) => (isNumber(v) ? fourDigits.format(v) : DASH),
  whole: (v) => (isNumber(v) ? grouped(v, 0) : DASH),
  perplexity: (v) => (isNumber(v) ? grouped(v, v < 100 ? 2 : v < 1000 ? 1 : 0) : DASH),
  percent: (v) => (isNumber(v) ? `${grouped(100 * v, 1)} %` : DASH),
  short: (v) => (isNumber(v) ? `${format.plain(100 * v)} %` : DASH),
  share: (v) => (isNumber(v) ? (v >= 0.001 ? format.percent(v) : `${+(100 * v).toPrecision(2)} %`) : DASH),
  error: (v) => (isNumber(v) ? v.toPrecision(3) : DASH),
  seconds: (v) => (isNumber(v) ? `${grouped(v, 1)} s` : DASH),
  bytes: (v) => (isNumber(v) ? (v < 1e9 ? `${grouped(v / 1e6, 1)} MB` : `${grouped(v / 1e9, 2)} GB`) : DASH),
};

// Ours is solid, thick and round; every other series differs in colour, marker and dash.
function seriesStyle(index, ours) {
  if (ours) return { colour: "var(--ours)", dash: "", shape: "circle", ours: true };
  return {
    colour: `var(--s${(index % COLOURS) + 1})`,
    dash: DASHES[(index + 1) % DASHES.length],
    shape: SHAPES[index % SHAPES.length],
  };
}
const denseStyle = { colour: "var(--dense)", dash: "1 4", shape: "ring" };

function marker(style, x, y, size) {
  const r = style.ours ? size * 1.25 : size;
  const at = (points) => `<path d="M${points.map(([a, b]) => `${(x + a * r).toFixed(1)} ${(y + b * r).toFixed(1)}`).join("L")}Z"`;
  const paint = ` fill="${style.colour}" class="mark"/>`;
  const bar = 0.38;
  switch (style.shape) {
    case "square": return at([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]) + paint;
    case "triangle": return at([[0, -1.2], [1.1, 0.8], [-1.1, 0.8]]) + paint;
    case "down": return at([[0, 1.2], [1.1, -0.8], [-1.1, -0.8]]) + paint;
    case "diamond": return at([[0, -1.3], [1.2, 0], [0, 1.3], [-1.2, 0]]) + paint;
    case "hexagon": return at([[-1.1, 0], [-0.55, -1], [0.55, -1], [1.1, 0], [0.55, 1], [-0.55, 1]]) + paint;
    case "plus":
    case "cross": {
      const arm = [[-bar, -1.2], [bar, -1.2], [bar, -bar], [1.2, -bar], [1.2, bar], [bar, bar],
        [bar, 1.2], [-bar, 1.2], [-bar, bar], [-1.2, bar], [-1.2, -bar], [-bar, -bar]];
      const turn = ([a, b]) => [(a - b) * Math.SQRT1_2, (a + b) * Math.SQRT1_2];
      return at(style.shape === "plus" ? arm : arm.map(turn)) + paint;
    }
    case "ring": return `<circle cx="${x}" cy="${y}" r="${r}" fill="var(--card)" stroke="${style.colour}" stroke-width="1.5"/>`;
    default: return `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}"${paint}`;
  }
}

function swatch(style) {
  const line = `<line x1="1" x2="25" y1="7" y2="7" stroke="${style.colour}" stroke-width="${style.ours ? 3 : 1.8}" stroke-dasharray="${style.dash}"/>`;
  return `<svg class="swatch" viewBox="0 0 26 14" width="26" height="14" aria-hidden="true">${line}${marker(style, 13, 7, 3.8)}</svg>`;
}

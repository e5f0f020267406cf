// What each figure shows. The numbers are those of the element #comparison.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const doc = read("comparison");
const view = read("view");
const hidden = new Set();

const styles = new Map(view.labels.map((label, i) => {
  const ours = doc.cells.find((c) => c.label === label && !c.sweep)?.method === view.ours;
  return [label, seriesStyle(i, ours && i === 0)];
}));
const styleOf = (label) => styles.get(label) || denseStyle;
const asked = (value) => `${+(100 * value).toPrecision(4)} %`;
const at = (object, path) => path.split(".").reduce((value, name) => value?.[name], object);

const METRICS = {
  perplexity: { title: "Perplexity", format: format.perplexity, tick: format.plain },
  average: { title: "Average accuracy", format: format.percent, tick: format.short, log: false },
};
const SPEED = "speed.decode_speedup";

function cellsOf(model) {
  return doc.cells.filter((c) => c.model === view.models[model] && !c.error);
}
const isDense = (cell) => cell.method === view.dense;
const mainCells = (model) => cellsOf(model).filter((c) => !c.sweep);
const denseOf = (model) => mainCells(model).find(isDense);
const shownCells = (model) => mainCells(model).filter((c) => !isDense(c) && !hidden.has(c.label));
const chosenCells = (context) => shownCells(context.model).filter((c) => c.asked === Number(context.sparsity));
const byLabel = (cells) => view.labels.map((label) => [label, cells.filter((c) => c.label === label)]).filter(([, found]) => found.length);
const denseRule = (model, field, text) => {
  const value = at(denseOf(model), field);
  return isNumber(value) ? [{ y: value, name: `dense ${text(value)}` }] : [];
};

// --- the figures ------------------------------------------------------------------------------------------------

const CHARTS = {
  sparsity(figure, { model, field }) {
    const metric = METRICS[field];
    const cells = shownCells(model);
    drawLines(figure, {
      x: { title: "Sparsity", format: format.short, ticks: [...new Set(cells.map((c) => c.asked))], log: false, span: 0.1 },
      y: metric,
      rules: denseRule(model, field, metric.format),
      series: byLabel(cells).map(([name, found]) => ({
        name, style: styleOf(name), points: found.map((c) => ({ x: c.sparsity, y: c[field] })),
      })),
    });
  },

  speed(figure, { model, field }) {
    const metric = METRICS[field];
    const point = (c) => ({ x: at(c, SPEED), y: c[field], tip: [isDense(c) ? "" : `asked: ${asked(c.asked)}`, tokensPerSecond(c)].filter(Boolean) });
    const dense = denseOf(model);
    const visible = mainCells(model).filter((c) => isDense(c) || !hidden.has(c.label));
    const front = view.fronts[view.models[model]][field];
    drawLines(figure, {
      x: { title: "Decode speed, \u00d7 dense", format: (v) => `${format.plain(v)}\u00d7`, log: false },
      y: metric,
      front: front.map((key) => visible.find((c) => c.key === key)).filter(Boolean).map(point),
      series: [
        ...(dense ? [{ name: "dense", style: denseStyle, points: [point(dense)] }] : []),
        ...byLabel(shownCells(model)).map(([name, cells]) => ({ name, style: styleOf(name), points: cells.map(point), scatter: true })),
      ],
    });
  },

  kept(figure, { model, field, ...context }) {
    const cells = byLabel(chosenCells({ model, ...context })).map(([, found]) => found[0]).filter((c) => c.layers?.length);
    const dense = denseOf(model)?.layers || [];
    const count = Math.max(0, ...cells.map((c) => c.layers.length));
    // Without a dense cell, the largest number that any method keeps stands for it.
    const most = Math.max(0, ...cells.flatMap((c) => c.layers.map((l) => l[field] ?? 0)));
    const full = (layer) => dense[layer]?.[field] ?? most;
    layerHeat(figure, cells, count, (c, layer) => c.layers[layer]?.[field], {
      share: (value, layer) => value / full(layer),
      line: (value, layer) => `${format.whole(value)} of ${format.whole(full(layer))}`,
    });
  },

  error(figure, { model, site, ...context }) {
    drawLines(figure, {
      x: { title: "Layer", format: format.whole, log: false },
      y: { title: "Relative error", format: format.error, tick: format.plain },
      sparse: true,
      series: byLabel(chosenCells({ model, ...context })).map(([name, [cell]]) => ({
        name, style: styleOf(name), points: (cell.layers || []).map((layer, x) => ({ x, y: layer.errors[site] })),
      })),
    });
  },

  rank(figure, { model, ...context }) {
    const dense = denseOf(model)?.effective_rank || analysis(model).effective_rank?.residual || [];
    const line = (name, style, values) => ({ name, style, points: (values || []).map((y, x) => ({ x, y })) });
    drawLines(figure, {
      x: { title: "Layer", format: format.whole, log: false },
      y: { title: "Effective rank", format: format.plain },
      sparse: true,
      series: [
        line("dense", { colour: "var(--dense)", dash: "", shape: "ring" }, dense),
        ...byLabel(chosenCells({ model, ...context })).map(([name, [cell]]) => line(name, styleOf(name), cell.effective_rank)),
      ],
    });
  },

  spectrum(figure, { model, field }) {
    const found = analysis(model);
    const values = found[`${field}_spectrum`];
    const sizes = { context: found.head_dim, act: found.intermediate_size, residual: found.hidden_size };
    const columns = Math.max(...values.map((row) => row.length));
    // Directions are sampled at evenly spaced ranks.
    const rank = (c) => (columns > 1 ? Math.round((c * ((sizes[field] || columns) - 1)) / (columns - 1)) + 1 : 1);
    const seen = values.flat().filter((v) => isNumber(v) && v > 0);
    const high = Math.log10(Math.max(...seen, 1e-12));
    const low = Math.max(Math.log10(Math.min(...seen, 1)), high - 6);
    drawHeat(figure, {
      rows: values.map((_, i) => String(i)), values, labelEvery: 5, cell: Math.max(6, Math.min(12, 330 / values.length)),
      yTitle: "Layer", xTitle: "Direction",
      colour: (v) => (v > 0 ? (Math.log10(v) - low) / (high - low || 1) : 0),
      tip: (r, c, v) => [`layer ${r}`, `direction ${rank(c)}`, `share ${format.share(v)}`],
      ticks: [0, Math.floor(columns / 2), columns - 1].map((c) => [c, String(rank(c))]),
      bar: [format.share(10 ** low), format.share(10 ** high)],
    });
  },

  sites(figure, { model }) {
    const names = { context: "context", act: "act", attention_output: "attention output", ffn_output: "FFN output", residual: "residual stream" };
    const ranks = analysis(model).effective_rank;
    drawLines(figure, {
      x: { title: "Layer", format: format.whole, log: false },
      y: { title: "Effective rank", format: format.plain },
      sparse: true,
      series: Object.keys(names).filter((key) => ranks[key]).map((key, i) => ({
        name: names[key], style: seriesStyle(i, false), points: ranks[key].map((y, x) => ({ x, y })),
      })),
    });
  },

  rope(figure, { model }) {
    const { kept_fraction: kept, relative_error: errors } = analysis(model).rope_pairs;
    const points = (values) => kept.map((x, i) => ({ x, y: values[i] }));
    const mean = kept.map((_, i) => {
      const known = errors.map((row) => row[i]).filter(isNumber);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    });
    drawLines(figure, {
      x: { title: "Rotary pairs kept", format: format.short, ticks: kept, log: false },
      y: { title: "Relative error", format: format.percent, tick: format.short, log: false, zero: true },
      series: [
        ...errors.map((row, layer) => ({ name: `layer ${layer}`, faint: true, style: { colour: "var(--dense)", dash: "" }, points: points(row) })),
        { name: "mean over layers (thin: each layer)", style: seriesStyle(0, true), points: points(mean) },
      ],
    });
  },

  healing(figure, { model }) {
    const cells = shownCells(model).filter((c) => c.healing);
    drawLines(figure, {
      x: { title: "Tokens", format: format.whole, log: false },
      y: { title: "Held-out KL", format: format.error, log: false },
      series: cells.map((c) => ({
        name: `${c.label}, ${asked(c.asked)}`, style: styleOf(c.label), points: c.healing.map((p) => ({ x: p.tokens, y: p.kl })),
      })),
    });
  },

  sweep(figure, { model, field, option }) {
    const cells = cellsOf(model).filter((c) => c.sweep?.option === option);
    const values = [...new Set(cells.map((c) => c.sweep.value))];
    const labels = values.every(isNumber) ? null : values.map(String);
    const others = (c) => Object.entries(c.options || {}).filter(([name]) => name !== option);
    const groups = new Map();
    for (const c of cells) {
      const key = JSON.stringify([c.method, c.asked, others(c)]);
      groups.set(key, [...(groups.get(key) || []), c]);
    }
    drawLines(figure, {
      x: { title: option, format: format.plain, ticks: values, labels },
      y: METRICS[field],
      rules: denseRule(model, field, METRICS[field].format),
      series: [...groups.values()].map((found, i) => ({
        // Cells of a sweep may be named one by one; then the method says what they have in common.
        name: `${found.every((c) => c.label === found[0].label) ? found[0].label : found[0].method}, ${asked(found[0].asked)}`,
        style: seriesStyle(i - 1, i === 0),
        points: found.map((c) => ({ x: labels ? values.indexOf(c.sweep.value) : c.sweep.value, y: c[field] })),
      })),
    });
  },

  time(figure, context) {
    // Results of version 0.1 call the plan "allocation".
    const parts = ["plan", "allocation", "layers", "finish", "write"];
    drawBars(figure, {
      format: format.seconds,
      rows: chosenCells(context).filter((c) => c.prune?.seconds).map((c) => {
        const seconds = c.prune.seconds;
        const known = parts.filter((name) => isNumber(seconds[name])).map((name) => ({ name, value: seconds[name] }));
        // What the phases leave of the total is drawn too, so that the bar is as long as the run.
        const rest = isNumber(seconds.total) ? seconds.total - known.reduce((sum, p) => sum + p.value, 0) : 0;
        return { name: c.label, style: styleOf(c.label), parts: rest > 0.05 ? [...known, { name: "other", value: rest }] : known };
      }),
    });
  },

  memory(figure, context) {
    drawBars(figure, {
      format: format.bytes,
      rows: chosenCells(context).map((c) => ({
        name: c.label, style: styleOf(c.label), parts: [{ name: "peak memory", value: c.prune?.peak_memory_bytes }],
      })),
    });
  },
};

const analysis = (model) => doc.analysis?.[view.models[model]] || {};

function tokensPerSecond(cell) {
  const value = cell.speed?.decode_tokens_per_second;
  return isNumber(value) ? `${grouped(value, 1)} tokens/s` : "";
}

function layerHeat(figure, cells, count, value, { share, line }) {
  if (!cells.length) return empty(figure.querySelector(".plot"));
  const layers = [...Array(count).keys()];
  const values = cells.map((c) => layers.map((layer) => value(c, layer)));
  const shares = values.flatMap((row) => row.map((v, layer) => (isNumber(v) ? share(v, layer) : 1)));
  // The ramp ends at the tenth below the smallest share: where all keep most, small differences are to be seen.
  const low = Math.min(0.9, Math.floor(10 * Math.min(...shares)) / 10);
  drawHeat(figure, {
    rows: cells.map((c) => c.label), ours: view.labels.find((label) => styleOf(label).ours), cell: 20, gap: 1.5, values,
    ramp: accentRamp,
    bar: [asked(low), "100 %"],
    ticks: layers.filter((layer) => layer % 5 === 0).map((layer) => [layer, String(layer)]),
    xTitle: "Layer",
    colour: (v, layer) => (share(v, layer) - low) / (1 - low),
    tip: (r, layer, v) => [cells[r].label, `layer ${layer}`, isNumber(v) ? line(v, layer) : DASH],
  });
}

/* Charts over optimizer steps, and the path of a run through KL and reward. */
const HEIGHT = 230;
const NARROWEST = 200;
const MARGIN = { left: 52, right: 14, top: 10, bottom: 34 };

/* About `count` round numbers that span low to high; whole ones where only these can be. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factors = whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const round = factors.map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const step = whole ? Math.max(1, round) : round;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === 0 && high === 0) return [0, 1];
  if (!(high > low)) {
    const room = Math.abs(low) * 0.1 || 1;
    return [low - room, high + room];
  }
  return [low, high];
}

function padded([low, high]) {
  const room = (high - low) * 0.05;
  // An axis of shares or counts that starts at 0 goes no further down.
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

class Plot {
  constructor(width, xs, ys, label, top = null) {
    this.width = width;
    this.top = top ?? Infinity;
    [this.x0, this.x1] = extent(xs);
    [this.y0, this.y1] = padded(extent(ys.map((value) => Math.min(value, this.top))));
    this.node = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label });
  }

  x(value) {
    return MARGIN.left + ((value - this.x0) / (this.x1 - this.x0)) * (this.width - MARGIN.left - MARGIN.right);
  }

  /* What is above the axis is drawn at its edge. */
  y(wanted) {
    const value = Math.min(wanted, this.top);
    return HEIGHT - MARGIN.bottom - ((value - this.y0) / (this.y1 - this.y0)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  axes(label, whole = false) {
    for (const value of ticks(this.y0, this.y1, 5)) {
      const y = this.y(value);
      this.node.append(svg("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }));
      this.node.append(svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, shown(value)));
    }
    for (const value of ticks(this.x0, this.x1, this.width / 70, whole)) {
      const at = { x: this.x(value), y: HEIGHT - MARGIN.bottom + 15, "text-anchor": "middle" };
      this.node.append(svg("text", at, shown(value)));
    }
    const middle = (MARGIN.left + this.width - MARGIN.right) / 2;
    this.node.append(svg("text", { x: middle, y: HEIGHT - 3, "text-anchor": "middle" }, label));
  }

  mark([value]) {
    const y = this.y(value);
    this.node.append(svg("line", { class: "mark", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }));
  }

  path(xs, ys) {
    return xs.map((x, i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(ys[i]).toFixed(1)}`).join("");
  }

  between(xs, low, high) {
    return `${this.path(xs, high)}${this.path([...xs].reverse(), [...low].reverse()).replace("M", "L")}Z`;
  }

  dot(x, y, attributes) {
    const node = svg("circle", { cx: this.x(x).toFixed(1), cy: this.y(y).toFixed(1), ...attributes });
    this.node.append(node);
    return node;
  }
}

function stacked(lines) {
  let below = lines[0].x.map(() => 0);
  return lines.map((line) => {
    const low = below;
    const high = line.y.map((value, i) => value + low[i]);
    below = high;
    return { ...line, low, high };
  });
}

function drawLine(plot, line, stack) {
  const { x, y, low, high, color } = line;
  if (stack) {
    plot.node.append(svg("path", { class: `area fill${color}`, d: plot.between(x, low, high) }));
  } else if (line.points) {
    plot.node.append(svg("path", { class: `thread stroke${color}`, d: plot.path(x, y) }));
    x.forEach((step, i) => plot.dot(step, y[i], { class: `dot fill${color}`, r: 3.6 }));
  } else if (x.length === 1) {
    plot.dot(x[0], y[0], { class: `dot fill${color}`, r: 3 });
  } else {
    plot.node.append(svg("path", { class: `band fill${color}`, d: plot.between(x, low, high) }));
    plot.node.append(svg("path", { class: `line stroke${color}`, d: plot.path(x, y) }));
  }
}

function nearest(xs, wanted) {
  let best = 0;
  xs.forEach((x, i) => {
    if (Math.abs(x - wanted) < Math.abs(xs[best] - wanted)) best = i;
  });
  return best;
}

function describe(line, i) {
  if (line.interval) return `${line.label.split(" ")[0]}: ${shown(line.y[i])} (${shown(line.low[i])} to ${shown(line.high[i])})`;
  const spread = line.points || line.low === undefined ? "" : ` ± ${shown((line.high[i] - line.low[i]) / 2, 3)}`;
  return `${line.label}: ${shown(line.y[i])}${spread}`;
}

/* Shows the values at the step under the pointer. */
function follow(plot, chart) {
  const { top, bottom } = MARGIN;
  const cursor = svg("line", { class: "cursor", y1: top, y2: HEIGHT - bottom, visibility: "hidden" });
  plot.node.append(cursor);
  const dense = chart.lines.reduce((best, line) => (line.x.length > best.x.length ? line : best));
  const reach = (plot.x1 - plot.x0) / 25;
  plot.node.addEventListener("pointermove", (event) => {
    const box = plot.node.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * plot.width;
    const share = (pixel - MARGIN.left) / (plot.width - MARGIN.left - MARGIN.right);
    const step = dense.x[nearest(dense.x, plot.x0 + share * (plot.x1 - plot.x0))];
    cursor.setAttribute("x1", plot.x(step));
    cursor.setAttribute("x2", plot.x(step));
    cursor.setAttribute("visibility", "visible");
    const values = chart.lines
      .map((line) => [line, nearest(line.x, step)])
      .filter(([line, i]) => Math.abs(line.x[i] - step) <= reach)
      .map(([line, i]) => describe(chart.kind === "stack" ? { ...line, low: undefined } : line, i));
    showTooltip([stepName(step), ...values].join("\n"), event);
  });
  plot.node.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    hideTooltip();
  });
}

function summary(chart) {
  const parts = chart.lines.map((line) => `${line.label} from ${shown(line.y[0])} to ${shown(line.y.at(-1))}`);
  return `${chart.title}: ${parts.join("; ")}`;
}

/* All charts over steps have the same axis: the steps of the run. */
const STEPS = extent(
  DATA.sections.flatMap((section) => section.charts.flatMap((chart) => (chart.kind === "path" ? [] : chart.lines.flatMap((line) => line.x)))),
);

function drawCurves(chart, width) {
  const stack = chart.kind === "stack";
  const lines = stack ? stacked(chart.lines) : chart.lines;
  const ys = lines.flatMap((line) => (line.points ? line.y : [...line.low, ...line.high]));
  const plot = new Plot(width, STEPS, chart.mark ? [...ys, chart.mark[0]] : ys, summary(chart), chart.top);
  plot.axes("optimizer step", true); // there is no half step
  lines.forEach((line) => drawLine(plot, line, stack));
  if (chart.mark) plot.mark(chart.mark);
  follow(plot, chart);
  return plot.node;
}

function drawPath(chart, width) {
  const all = (name) => chart.lines.flatMap((line) => line[name]);
  const plot = new Plot(width, all("x"), all("y"), summary(chart));
  plot.axes("KL, nats per token");
  const last = Math.max(...all("step"));
  const color = (step) => `color-mix(in oklab, var(--late) ${((100 * step) / last).toFixed(1)}%, var(--early))`;
  for (const line of chart.lines) {
    if (!line.points) plot.node.append(svg("path", { class: "thread", stroke: "var(--soft)", d: plot.path(line.x, line.y) }));
    line.x.forEach((x, i) => {
      const dot = plot.dot(x, line.y[i], { class: "dot", r: line.points ? 5.5 : 2.8 });
      dot.style.fill = color(line.step[i]);
      if (line.points) dot.style.stroke = "var(--ink)";
      const text = `${stepName(line.step[i])}, ${line.label}\nKL ${shown(x)}, reward ${shown(line.y[i])}`;
      dot.addEventListener("pointermove", (event) => showTooltip(text, event));
      dot.addEventListener("pointerleave", hideTooltip);
    });
  }
  return plot.node;
}

function key(chart) {
  if (chart.kind === "path") {
    const bar = html("span", {}, "early ");
    const scale = svg("svg", { viewBox: "0 0 60 10", style: "width:60px" });
    for (let i = 0; i < 12; i++) {
      const box = svg("rect", { x: i * 5, y: 0, width: 5.2, height: 10 });
      box.style.fill = `color-mix(in oklab, var(--late) ${(100 * i) / 11}%, var(--early))`;
      scale.append(box);
    }
    bar.append(scale, "late step");
    const rings = chart.lines.some((line) => line.points) ? [html("li", {}, "outlined: validation")] : [];
    return html("ul", { class: "key" }, html("li", {}, bar), ...rings);
  }
  if (chart.lines.length === 1 && chart.lines[0].label === chart.title) return "";
  const items = chart.lines.map((line) => {
    const sign = svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
    if (line.points) sign.append(svg("circle", { class: `fill${line.color}`, cx: 11, cy: 5, r: 3.6 }));
    else sign.append(svg("rect", { class: `fill${line.color}`, y: 3.5, width: 22, height: 3 }));
    return html("li", {}, sign, line.label);
  });
  if (chart.mark) {
    const sign = svg("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
    sign.append(svg("line", { class: "mark", x1: 0, x2: 22, y1: 5, y2: 5 }));
    items.push(html("li", {}, sign, chart.mark[1]));
  }
  return html("ul", { class: "key" }, ...items);
}

/* A chart is as wide as its place on the page, in pixels: whatever the place, its texts have the size of the style. */
function draw(figure, chart) {
  const style = getComputedStyle(figure);
  const inner = figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const width = Math.max(NARROWEST, Math.floor(inner));
  const drawn = figure.querySelector("svg.chart");
  if (drawn && drawn.viewBox.baseVal.width === width) return;
  const node = chart.kind === "path" ? drawPath(chart, width) : drawCurves(chart, width);
  if (drawn) drawn.replaceWith(node);
  else figure.append(node);
}

function chartFigure(chart) {
  return html("figure", chart.wide ? { class: "wide" } : {}, html("figcaption", {}, chart.title), key(chart));
}

const figures = new Map();

for (const [number, section] of DATA.sections.entries()) {
  const title = `section-${number}`;
  const drawn = section.charts.map(chartFigure);
  drawn.forEach((figure, i) => figures.set(figure, section.charts[i]));
  const charts = html("div", { class: "charts" }, ...drawn);
  const smoothed = section.charts.some((chart) => chart.lines.some((line) => line.low && chart.kind === "curves"));
  const heading = html("h2", { id: title }, section.title);
  const text = "Lines are means over a 25th of the steps, bands one standard deviation in the same window.";
  const hint = number === 0 && smoothed ? [html("p", { class: "hint" }, text)] : [];
  const told = section.text ? [html("p", { class: "told" }, section.text)] : [];
  byId("sections").append(html("section", { "aria-labelledby": title }, heading, ...told, charts, ...hint));
}

const drawAll = () => figures.forEach((chart, figure) => draw(figure, chart));
drawAll();
new ResizeObserver(drawAll).observe(byId("sections"));
window.addEventListener("beforeprint", drawAll);
window.addEventListener("afterprint", drawAll);

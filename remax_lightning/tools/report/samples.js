/* The table of samples: filter, sort, page, and shade the tokens. */
const PAGE = 20;
const COLUMNS = [
  ["step", "step"],
  ["stage", "stage"],
  ["reward", "reward"],
  ["baseline_reward", "greedy reward"],
  ["advantage", "advantage"],
  ["kl", "KL, nats"],
  ["response_length", "tokens"],
];
const SHADES = {
  token_kl: { name: "KL, nats per token", high: "var(--high)", low: "var(--low)" },
  token_advantages: { name: "advantage", high: "var(--good)", low: "var(--bad)" },
};

const samples = DATA.samples;
const view = { sort: "step", descending: true, page: 0, shade: "token_kl" };

/* The size at which the color is full: a few outliers must not turn all else pale. */
function fullShade(name) {
  const sizes = [];
  for (const sample of samples) for (const value of sample[name] ?? []) if (value !== null) sizes.push(Math.abs(value));
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes.at(-1) || 0;
}

const full = Object.fromEntries(Object.keys(SHADES).map((name) => [name, fullShade(name)]));

function color(name, value) {
  const share = Math.min(1, Math.abs(value) / full[name]);
  return `color-mix(in oklab, ${SHADES[name][value < 0 ? "low" : "high"]} ${(70 * share).toFixed(1)}%, transparent)`;
}

function searched(sample) {
  sample.searched ??= [sample.prompt, sample.response, sample.greedy_response].join("\n").toLowerCase();
  return sample.searched;
}

function field(name) {
  return byId("controls").elements[name].value;
}

function within(value, from, to) {
  if (from === "" && to === "") return true;
  return value !== undefined && (from === "" || value >= Number(from)) && (to === "" || value <= Number(to));
}

function filtered() {
  const text = field("text").toLowerCase();
  const stage = field("stage");
  const [rewardFrom, rewardTo] = [field("reward-from"), field("reward-to")];
  const [stepFrom, stepTo] = [field("step-from"), field("step-to")];
  return samples.filter(
    (sample) =>
      (!stage || sample.stage === stage || stageName(sample) === stage) &&
      within(sample.reward, rewardFrom, rewardTo) &&
      within(sample.step, stepFrom, stepTo) &&
      (!text || searched(sample).includes(text)),
  );
}

/* What has no value stands last, whichever way the others are sorted. */
function sorted(found) {
  const { sort, descending } = view;
  const sign = descending ? -1 : 1;
  return found.sort((a, b) => {
    const [x, y] = [a[sort], b[sort]];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return x < y ? -sign : x > y ? sign : 0;
  });
}

/* A character of several tokens stands at the last of them; they are shown as one. */
function pieces(tokens) {
  const found = [];
  let first = 0;
  tokens.forEach((token, i) => {
    if (token === "" && i + 1 < tokens.length) return;
    if (token === "") for (let j = first; j <= i; j++) found.push({ text: "", first: j, last: j });
    else found.push({ text: token, first, last: i });
    first = i + 1;
  });
  return found;
}

const MARKS = { " ": "·", "\n": "↵", "\r": "↵", "\t": "→" };
const BLANK = /[\s\p{Cc}\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f]/u; // and what has no width

/* Where the visible part of a text begins and ends; a text of blanks alone has none. */
function visiblePart(text) {
  const characters = [...text];
  let begin = 0;
  let end = characters.length;
  while (begin < end && BLANK.test(characters[begin])) begin++;
  while (end > begin && BLANK.test(characters[end - 1])) end--;
  const length = (part) => part.join("").length;
  return [length(characters.slice(0, begin)), length(characters.slice(0, end))];
}

/* A piece of a text, whose blanks before and after the visible part get a mark; `offset` is where the piece begins.
   The marks are drawn by the style: what is copied or searched stays the text itself. */
function marked(piece, offset, [begin, end]) {
  const nodes = [];
  let plain = "";
  let at = offset;
  for (const character of piece) {
    if (at < begin || at >= end) {
      if (plain) nodes.push(plain);
      plain = "";
      nodes.push(html("span", { class: "blank", "data-mark": MARKS[character] ?? "◌" }, character));
    } else plain += character;
    at += character.length;
  }
  return plain ? [...nodes, plain] : nodes;
}

function plainText(text) {
  return marked(text, 0, visiblePart(text));
}

function responseText(sample) {
  if (!sample.tokens) return plainText(sample.response);
  const part = visiblePart(sample.response);
  let offset = 0;
  return pieces(sample.tokens).map(({ text, first, last }) => {
    const nodes = marked(text, offset, part);
    offset += text.length;
    return html("span", { "data-i": first, "data-last": last, ...(text ? {} : { class: "special" }) }, ...nodes);
  });
}

/* Values of one token; of several, what they add up to for the KL and their mean for the advantage. */
function valueOf(sample, name, node) {
  const [first, last] = [Number(node.dataset.i), Number(node.dataset.last)];
  const values = (sample[name] ?? []).slice(first, last + 1).filter((value) => value !== null);
  if (!values.length) return undefined;
  const sum = values.reduce((a, b) => a + b);
  return name === "token_kl" ? sum : sum / values.length;
}

function shade() {
  for (const node of document.querySelectorAll("#rows [data-i]")) {
    const value = view.shade ? valueOf(samples[node.closest("tbody").dataset.sample], view.shade, node) : undefined;
    node.style.backgroundColor = value === undefined ? "" : color(view.shade, value);
  }
}

function side(title, nodes) {
  const content = nodes.length ? nodes : [html("span", { class: "nothing" }, "empty")];
  return html("div", { class: "side" }, html("h3", {}, title), html("div", { class: "text", tabindex: 0 }, ...content));
}

function stageName(sample) {
  return isBefore(sample.step) ? "before training" : sample.stage;
}

function row(sample) {
  const numbers = COLUMNS.map(([name, label]) => {
    const text = name === "stage" ? stageName(sample) : shown(sample[name]);
    const cut = name === "response_length" && sample.truncated ? " (cut)" : "";
    return html("td", { "data-label": label, ...(name === view.sort ? { class: "sorted" } : {}) }, text + cut);
  });
  numbers.push(html("td", { class: "rest" }));
  const parts = Object.entries(sample.parts).map(([name, value]) => `${name} ${shown(value)}`);
  const greedy = sample.greedy_response === undefined ? [] : [side("greedy", plainText(sample.greedy_response))];
  const sampled = side(parts.length ? `sampled · ${parts.join(" · ")}` : "sampled", responseText(sample));
  const sides = html("div", { class: "sides" }, side("prompt", plainText(sample.prompt ?? "")), sampled, ...greedy);
  return html(
    "tbody",
    { "data-sample": samples.indexOf(sample) },
    html("tr", { class: "numbers" }, ...numbers),
    html("tr", { class: "texts" }, html("td", { colspan: COLUMNS.length + 1 }, sides)),
  );
}

function render() {
  const found = sorted(filtered());
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  view.page = Math.min(view.page, pages - 1);
  const table = byId("rows");
  table.querySelectorAll("tbody").forEach((body) => body.remove());
  table.append(...found.slice(view.page * PAGE, (view.page + 1) * PAGE).map(row));
  byId("count").textContent = `${shown(found.length)} of ${shown(samples.length)} samples`;
  byId("page").textContent = `page ${view.page + 1} of ${pages}`;
  byId("previous").disabled = view.page === 0;
  byId("next").disabled = view.page === pages - 1;
  for (const head of document.querySelectorAll("#columns th")) {
    if (head.dataset.name === view.sort) head.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  shade();
}

function legend() {
  const node = byId("legend");
  const name = view.shade;
  node.hidden = !name || full[name] === 0;
  if (node.hidden) return;
  const bar = html("i");
  bar.style.background = `linear-gradient(to right, ${color(name, -full[name])}, transparent, ${color(name, full[name])})`;
  node.replaceChildren(`−${shown(full[name], 2)}`, bar, `+${shown(full[name], 2)} ${SHADES[name].name}`);
  node.setAttribute("aria-label", `colors from −${shown(full[name], 2)} to ${shown(full[name], 2)}, ${SHADES[name].name}`);
}

function tokenText(node) {
  const sample = samples[node.closest("tbody").dataset.sample];
  const [first, last] = [Number(node.dataset.i) + 1, Number(node.dataset.last) + 1];
  const special = node.classList.contains("special") ? ", special or the end" : "";
  const lines = [first === last ? `token ${first}${special}` : `tokens ${first} to ${last}, one character`];
  for (const name of Object.keys(SHADES)) {
    const value = valueOf(sample, name, node);
    if (value !== undefined) lines.push(`${SHADES[name].name}: ${shown(value)}`);
  }
  return lines.join("\n");
}

function turn(pages) {
  view.page += pages;
  render();
  byId("samples").scrollIntoView();
}

function listen() {
  const restart = () => {
    view.page = 0;
    render();
  };
  const controls = byId("controls");
  controls.addEventListener("input", restart);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", () => setTimeout(restart)); // the fields are empty only afterwards
  byId("shading").addEventListener("change", (event) => {
    view.shade = event.target.value;
    legend();
    shade();
  });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  const table = byId("rows");
  table.addEventListener("pointermove", (event) => {
    const node = event.target.closest("[data-i]");
    if (node) showTooltip(tokenText(node), event);
    else hideTooltip();
  });
  table.addEventListener("pointerleave", hideTooltip);
}

function hint(name, from, to) {
  const [low, high] = extent(samples.map((sample) => sample[name]).filter((value) => value !== undefined));
  byId("controls").elements[from].placeholder = Number.isFinite(low) ? shown(low) : "";
  byId("controls").elements[to].placeholder = Number.isFinite(high) ? shown(high) : "";
}

function head([name, text]) {
  const button = html("button", { type: "button" }, text);
  button.addEventListener("click", () => {
    view.descending = view.sort === name ? !view.descending : name !== "stage";
    view.sort = name;
    view.page = 0;
    render();
  });
  return html("th", { scope: "col", "data-name": name }, button);
}

if (samples.length) {
  byId("samples").hidden = false;
  byId("columns").append(...COLUMNS.map(head), html("td", { class: "rest" }));
  byId("controls").elements.stage.lastElementChild.hidden = !samples.some((sample) => isBefore(sample.step));
  const shaded = Object.keys(SHADES).filter((name) => samples.some((sample) => sample[name]));
  for (const input of document.querySelectorAll("#shading input")) {
    if (input.value && !shaded.includes(input.value)) input.closest("label").remove();
  }
  byId("shading").hidden = !shaded.length;
  view.shade = shaded[0] ?? "";
  const chosen = document.querySelector(`#shading [value="${view.shade}"]`);
  if (chosen) chosen.checked = true;
  hint("reward", "reward-from", "reward-to");
  hint("step", "step-from", "step-to");
  listen();
  legend();
  render();
}

"use strict";
// Everything shown comes from files of runs: it is set as text, never as markup.

const POLL_MS = 1000, IDLE_MS = 10000;
const main = document.getElementById("main"), where = document.getElementById("where"), live = document.getElementById("live");
let timer = 0, shown = "", picked = new Set(), chosen = new Set(), memberCurves = new Map();
let sort = { key: "name", down: true }, filter = { text: "", status: "" };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child != null) node.append(child);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  for (const child of children.flat()) if (child != null) node.append(child);
  return node;
}

async function get(path) {
  const answer = await fetch(path);
  const found = (answer.headers.get("Content-Type") || "").includes("json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
}

const number = (x, digits = 4) => {
  if (x == null || !Number.isFinite(x)) return "–";
  if (x !== 0 && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3)) return x.toExponential(2);
  return Number(x.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits });
};
const percent = (x) => `${(100 * x).toFixed(x > 0.995 && x < 1 ? 1 : 0)} %`;
function duration(s) {
  if (s == null) return "–";
  const h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60), rest = Math.floor(s % 60);
  return h ? `${h} h ${m} min` : m ? `${m} min ${rest} s` : `${rest} s`;
}
const state = (name) => el("span", { class: `state ${name}` }, name);

// --- charts ---------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= raw) || unit;
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + 1e-9 * step; x += step) found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return found;
}

// series: {name, color, points: [[x, y]], band: [[x, low, high]], range: [[x, low, high]], thin}
function chart({ series, label, xLabel, yLabel, xs, ys, even, width = main.clientWidth < 640 ? 350 : 520, height = 250 }) {
  const all = series.flatMap((s) => s.points.concat((s.band || []).flatMap(([x, a, b]) => [[x, a], [x, b]])));
  const known = all.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
  if (!known.length) return el("p", { class: "dim" }, "Nothing has been reported yet.");
  const box = { left: 52, right: 22, top: 10, bottom: 34 };
  let [x0, x1] = xs || [Math.min(...known.map((p) => p[0])), Math.max(...known.map((p) => p[0]))];
  let [y0, y1] = ys || spread(known.map((p) => p[1]));
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 === y1) { y0 -= 0.5; y1 += 0.5; }
  const X = (x) => box.left + ((x - x0) / (x1 - x0)) * (width - box.left - box.right);
  const Y = (y) => height - box.bottom - ((Math.min(Math.max(y, y0), y1) - y0) / (y1 - y0)) * (height - box.top - box.bottom);
  const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const y of ticks(y0, y1, 4)) {
    node.append(svg("line", { class: "axis", x1: box.left, x2: width - box.right, y1: Y(y), y2: Y(y) }),
      svg("text", { x: box.left - 6, y: Y(y) + 4, "text-anchor": "end" }, number(y, 3)));
  }
  for (const x of ticks(x0, x1, 5)) node.append(svg("text", { x: X(x), y: height - box.bottom + 15, "text-anchor": "middle" }, number(x, 4)));
  node.append(svg("text", { x: (box.left + width) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 12, y: (height - box.bottom) / 2, transform: `rotate(-90 12 ${(height - box.bottom) / 2})`, "text-anchor": "middle" }, yLabel));
  if (even === "diagonal") node.append(svg("line", { class: "even", x1: X(x0), y1: Y(x0), x2: X(x1), y2: Y(x1) }));
  if (typeof even === "number") node.append(svg("line", { class: "even", x1: X(x0), y1: Y(even), x2: X(x1), y2: Y(even) }));
  const area = (rows) => rows.map(([x, , high]) => `${X(x)},${Y(high)}`).concat([...rows].reverse().map(([x, low]) => `${X(x)},${Y(low)}`)).join(" ");
  for (const s of series) {
    const group = svg("g", { class: s.color });
    for (const piece of pieces(s.range || [])) group.append(svg("polygon", { class: "range", points: area(piece) }));
    for (const piece of pieces(s.band || [])) group.append(svg("polygon", { class: "band", points: area(piece) }));
    const points = s.points.filter((p) => p.every(Number.isFinite));
    if (s.bars) for (const [x, y] of points) group.append(svg("rect", { class: "bar", x: X(x) + 1, y: Y(y), width: Math.max(1, X(x + s.bars) - X(x) - 2), height: Math.max(0, Y(0) - Y(y)) }));
    else for (const piece of pieces(points)) group.append(svg("polyline", { class: s.thin ? "thin" : "mark", points: piece.map(([x, y]) => `${X(x)},${Y(y)}`).join(" ") }));
    if (s.dots) for (const [x, y, n] of points) group.append(svg("circle", { cx: X(x), cy: Y(y), r: n ? 2 + 9 * Math.sqrt(n) : 3, fill: "currentColor", "fill-opacity": 0.7 }));
    node.append(group);
  }
  return node;
}

// A phase of training that ended early leaves its other steps out: nothing is drawn across them.
function pieces(rows) {
  const gap = (i) => rows[i][0] - rows[i - 1][0], found = [];
  rows.forEach((row, i) => {
    const leaps = i > 1 && i + 1 < rows.length && gap(i) > 5 * Math.max(gap(i - 1), gap(i + 1));
    if (!i || leaps) found.push([]);
    found[found.length - 1].push(row);
  });
  return found;
}

// A few first steps far above the rest would flatten the curve.
function spread(values) {
  const sorted = [...values].sort((a, b) => a - b), at = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  const low = sorted[0], high = at(0.97) + 0.25 * (at(0.97) - low);
  return [low, Math.min(sorted[sorted.length - 1], high)];
}

const legend = (entries) => el("div", { class: "legend" }, entries.map(([name, color]) => el("span", { class: `key ${color}` }, name)));

function ensembleSeries(curve, name, color) {
  const zip = (f) => curve.step.map((x, i) => f(x, i));
  return {
    name, color,
    points: zip((x, i) => [x, curve.mean[i]]),
    band: zip((x, i) => [x, Math.max(curve.low[i], curve.mean[i] - curve.std[i]), Math.min(curve.high[i], curve.mean[i] + curve.std[i])]),
    range: zip((x, i) => [x, curve.low[i], curve.high[i]]),
  };
}

// --- the list -------------------------------------------------------------------------------------------------------

async function showList() {
  const { runs, root } = await get("api/runs");
  where.textContent = `${runs.length} runs below ${root}`;
  document.title = "bdl runs";
  if (!document.getElementById("rows")) main.replaceChildren(listFrame());
  fillList(runs);
  return runs.some((run) => ["running", "queued"].includes(run.status));
}

function listFrame() {
  const search = el("input", { type: "search", placeholder: "filter: experiment, method, name", "aria-label": "filter runs", oninput: (e) => { filter.text = e.target.value; refresh(); } });
  search.value = filter.text;
  const status = el("select", { "aria-label": "status", onchange: (e) => { filter.status = e.target.value; refresh(); } },
    ["", "running", "planned", "queued", "complete", "partial", "failed", "interrupted", "pruned", "damaged"].map((s) => el("option", { value: s, selected: s === filter.status }, s || "any status")));
  const compare = el("button", { id: "compare", disabled: true, onclick: () => { location.hash = "#/compare/" + [...picked].map(encodeURIComponent).join(","); } }, "Compare");
  const columns = [["", ""], ["experiment", "experiment"], ["status", "status"], ["members", "members"], ["method", "method"], ["split", "split"], ["seed", "seed"], ["metrics", "test metrics"], ["name", "started"]];
  const head = el("tr", {}, columns.map(([key, title]) => el("th", { class: ["method", "split", "seed"].includes(key) ? "wide" : "" },
    key && key !== "metrics" ? el("button", { onclick: () => { sort = { key, down: sort.key === key ? !sort.down : true }; refresh(); } }, title) : title)));
  return el("div", {}, el("div", { class: "tools" }, search, status, compare),
    el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, head), el("tbody", { id: "rows" }))));
}

function fillList(runs) {
  const text = filter.text.toLowerCase();
  const kept = runs.filter((r) => (!filter.status || r.status === filter.status) && `${r.experiment} ${r.method} ${r.name} ${r.status}`.toLowerCase().includes(text));
  const by = (r) => (r[sort.key] ?? "");
  kept.sort((a, b) => (by(a) < by(b) ? -1 : by(a) > by(b) ? 1 : 0) * (sort.down ? -1 : 1));
  const rows = kept.map((run) => {
    const box = el("input", { type: "checkbox", "aria-label": `compare ${run.id}`, checked: picked.has(run.id), onchange: (e) => { e.target.checked ? picked.add(run.id) : picked.delete(run.id); document.getElementById("compare").disabled = picked.size < 2; } });
    const members = run.done == null ? `${run.members}` : `${run.done}/${run.members}`;
    const headline = Object.entries(run.metrics).slice(0, 2).map(([key, value]) => `${key.replace("test/", "")} ${number(value)}`).join(" · ");
    return el("tr", {}, el("td", {}, box), el("td", {}, el("a", { href: "#/run/" + encodeURIComponent(run.id) }, run.experiment)), el("td", {}, state(run.status)),
      el("td", {}, members, run.failed ? el("span", { class: "dim" }, ` (${run.failed} failed)`) : ""), el("td", { class: "wide" }, run.method), el("td", { class: "wide" }, run.split ?? ""), el("td", { class: "wide" }, run.seed ?? ""),
      el("td", {}, headline), el("td", { class: "dim small" }, run.name));
  });
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: 9, class: "dim" }, runs.length ? "No run matches the filter." : "No runs yet: start one with bdl train.")));
  document.getElementById("rows").replaceChildren(...rows);
  document.getElementById("compare").disabled = picked.size < 2;
}

// --- one run --------------------------------------------------------------------------------------------------------

async function showRun(id) {
  const run = await get("api/run?id=" + encodeURIComponent(id));
  where.textContent = id;
  document.title = `${run.status}: ${id}`;
  const open = new Set([...main.querySelectorAll("details[open]")].map((node) => node.id));
  const wanted = [...chosen].filter((m) => !memberCurves.has(`${id} ${m}`) || run.status === "running");
  for (const member of wanted) memberCurves.set(`${id} ${member}`, (await get(`api/member?id=${encodeURIComponent(id)}&member=${member}`)).curves);
  const cards = [overview(id, run), el("div", { class: "grid" }, curveCard(id, run, ["train/nll", "val/nll"], "Negative log likelihood", "nats per example"), curveCard(id, run, ["val/stack_nll", "val/disagreement"], "Ensemble on the validation part", "nats, or variance")),
    memberCard(id, run), ...run.evaluations.map((one) => evaluationCard(id, one)), outcomeCards(run), planCard(run), decisionCard(run), detail("config", "Configuration", el("pre", {}, run.config))];
  const read = document.getElementById("metrics-box")?.scrollTop || 0;
  main.replaceChildren(...cards.filter(Boolean));
  if (read) document.getElementById("metrics-box")?.scrollTo(0, read);
  for (const node of main.querySelectorAll("details")) if (open.has(node.id)) node.open = true;
  return ["running", "queued"].includes(run.status);
}

function fact(name, value) { return el("div", {}, el("dt", {}, name), el("dd", {}, value)); }

function overview(id, run) {
  const count = (s) => run.members.filter((m) => m.state === s).length;
  const p = run.progress;
  return el("section", { class: "card" }, el("h1", {}, id.split("/").slice(-2).join(" / ")),
    run.status === "complete" ? null : el("progress", { max: 1, value: p.share, "aria-label": "progress" }),
    el("dl", { class: "facts" }, fact("status", state(run.status)), fact("members", `${count("done")} of ${run.num_members} done${count("failed") ? `, ${count("failed")} failed` : ""}`),
      run.status === "complete" ? null : fact("progress", percent(p.share)), p.per_s ? fact("member-steps a second", number(p.per_s, 3)) : null, p.left_s ? fact("left, at most", duration(p.left_s)) : null,
      run.cost.wall_time_s ? fact("wall time", duration(run.cost.wall_time_s)) : null, run.cost.device_time_s ? fact("device time", duration(run.cost.device_time_s)) : null, fact("events", run.events.toLocaleString("en"))));
}

function curveCard(id, run, keys, title, unit) {
  const series = keys.filter((key) => run.curves[key]?.step.length).map((key, i) => ensembleSeries(run.curves[key], key, `c${keys.indexOf(key)}`));
  const own = [...chosen].flatMap((member) => keys.map((key, i) => ({ name: `${key} of member ${member}`, color: `c${i}`, thin: true, points: memberCurves.get(`${id} ${member}`)?.[key] || [] }))).filter((s) => s.points.length);
  const many = keys[0] === "train/nll";
  return el("section", { class: "card" }, el("h2", {}, title), chart({ series: [...series, ...(many ? own : [])], label: `${title} by step`, xLabel: "step", yLabel: unit }),
    legend(series.map((s) => [s.name, s.color])), many ? el("p", { class: "dim small" }, "Line: mean over members. Dark band: ± one standard deviation, light band: least to largest. Dashed: members chosen below.") : null);
}

function memberCard(id, run) {
  const rows = run.members.filter((m) => m.state !== "done" || chosen.has(m.id) || run.members.length <= 12).slice(0, 60);
  const tiles = run.members.map((m) => el("button", { class: `tile ${m.state}`, "aria-pressed": String(chosen.has(m.id)), title: `member ${m.id}: ${m.state}${m.where ? ` on ${m.where}` : ""}${m.reason ? `, ${m.reason}` : ""}`, "aria-label": `member ${m.id}, ${m.state}`,
    onclick: () => { chosen.has(m.id) ? chosen.delete(m.id) : chosen.add(m.id); if (chosen.size > 6) chosen.delete(chosen.values().next().value); refresh(); } }, String(m.id)));
  const counts = {};
  for (const m of run.members) counts[m.state] = (counts[m.state] || 0) + 1;
  return el("section", { class: "card", id: "members" }, el("h2", {}, "Members"), el("div", { class: run.members.length > 120 ? "tiles many" : "tiles" }, tiles),
    el("div", { class: "legend" }, Object.entries(counts).map(([s, n]) => el("span", {}, state(s), ` ${n}`))),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["member", "state", "stack", "where", "train", "val", "starts over", "reason"].map((t) => el("th", {}, t)))),
      el("tbody", {}, rows.map((m) => el("tr", {}, el("td", {}, m.id), el("td", {}, state(m.state)), el("td", {}, m.stack ?? ""), el("td", {}, [m.where, m.device].filter(Boolean).join(", ")), el("td", {}, number(m["train/nll"])), el("td", {}, number(m["val/nll"])), el("td", {}, m.retries || ""), el("td", {}, m.reason || "")))))),
    run.members.length > rows.length ? el("p", { class: "dim small" }, `${rows.length} of ${run.members.length} are listed: those that are not done, and those chosen above.`) : null);
}

function outcomeCards(run) {
  const out = run.outcome, cards = [];
  if (out.damaged) cards.push(el("section", { class: "card" }, el("h2", {}, "Evaluation"), el("p", {}, `damaged: ${out.damaged}`)));
  if (out.metrics?.length) {
    const rows = out.metrics.map((m) => el("tr", {}, el("td", {}, m.key.split(/(?<=[/_])/).flatMap((part) => [part, el("wbr")]), el("div", { class: "dim small" }, m.meaning || "")), el("td", { class: "number" }, number(m.value), m.low == null || m.high == null ? null : el("div", { class: "dim small nowrap" }, `${number(m.low, 3)} to ${number(m.high, 3)}`)), el("td", {}, { lower: "↓", higher: "↑" }[m.better] || ""), el("td", { class: "dim" }, m.unit || "")));
    cards.push(el("section", { class: "card" }, el("h2", {}, "Posterior predictive on the test part"), out.metrics.some((m) => m.low != null) ? el("p", { class: "dim small" }, "Small numbers: 95 % intervals over resampled rows.") : null, el("div", { class: "scroll tall", id: "metrics-box", tabindex: 0 }, el("table", { id: "metrics" }, el("tbody", {}, rows)))));
  }
  if (out.reliability) {
    const n = out.reliability.reduce((sum, bin) => sum + bin[2], 0);
    cards.push(el("section", { class: "card" }, el("h2", {}, "Reliability"), chart({ series: [{ name: "bins", color: "c0", dots: true, points: out.reliability.map(([c, a, k]) => [c, a, k / n]) }], label: "accuracy by confidence", xLabel: "confidence", yLabel: "accuracy", xs: [0, 1], ys: [0, 1], even: "diagonal" }),
      el("p", { class: "dim small" }, `${n.toLocaleString("en")} test rows; the area of a dot is its share of them. On the dashed line confidence is right.`)));
  }
  if (out.coverage) cards.push(el("section", { class: "card" }, el("h2", {}, "Coverage"), chart({ series: [{ name: "coverage", color: "c0", points: out.coverage }], label: "rows inside central intervals by level", xLabel: "level of the central interval", yLabel: "rows inside", xs: [0, 1], ys: [0, 1], even: "diagonal" }),
    el("p", { class: "dim small" }, "On the dashed line intervals hold as many rows as they promise; below it they are too narrow.")));
  if (out.pit) cards.push(el("section", { class: "card" }, el("h2", {}, "PIT"), chart({ series: [{ name: "PIT", color: "c2", bars: 1 / out.pit.length, points: out.pit.map((y, i) => [i / out.pit.length, y]) }], label: "histogram of the probability integral transform", xLabel: "P(Y ≤ y)", yLabel: "density", xs: [0, 1], ys: [0, Math.max(1.5, ...out.pit)], even: 1 }),
    el("p", { class: "dim small" }, "Flat at 1 when the predictive is right; high ends: too sure.")));
  return cards.length ? el("div", { class: "grid" }, cards) : null;
}

const LEVELS = { good: "good", note: "note", warn: "look here", empty: "nothing", damaged: "damaged" };

function evaluationCard(id, one) {
  const look = one.chapters.filter((c) => c.level === "warn" || c.level === "damaged").length;
  const count = one.chapters.length ? `${one.chapters.length} chapters${look ? `, ${look} to look at` : ""}` : "no chapters";
  const address = `report?id=${encodeURIComponent(id)}&name=${encodeURIComponent(one.name)}`;
  return el("section", { class: "card evaluation" },
    el("div", { class: "tools" }, el("h2", {}, `Evaluation ${one.name}`), el("span", { class: "dim small" }, count),
      one.report ? el("a", { class: "button", href: address, target: "_blank", rel: "noopener" }, "Open the report") : el("span", { class: "dim small end" }, "no report yet: bdl report writes it")),
    el("ul", { class: "chapters" }, one.chapters.map((c) => chapterItem(one.name, c))));
}

function chapterItem(name, c) {
  const remarks = c.warnings.length === 1 ? "1 remark" : `${c.warnings.length} remarks`;
  return el("li", { class: "chapter" }, el("span", { class: `level ${c.level}` }, LEVELS[c.level] || c.level),
    el("div", {}, el("h3", {}, c.title), el("p", {}, c.verdict),
      c.warnings.length ? el("details", { id: `remarks-${name}-${c.key}` }, el("summary", { class: "dim small" }, remarks), el("ul", { class: "plain small" }, c.warnings.map((w) => el("li", {}, w)))) : null));
}

function planCard(run) {
  const rows = run.stacks.map((s) => el("tr", {}, el("td", {}, s.id), el("td", {}, state(s.state)), el("td", {}, s.size), el("td", {}, s.num_steps ? `${s.step ?? 0}/${s.num_steps}` : ""), el("td", {}, [s.node || s.host, s.device, s.ranks > 1 ? `${s.ranks} ranks` : ""].filter(Boolean).join(", ")), el("td", {}, s.starts > 1 ? s.starts - 1 : "")));
  const table = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["stack", "state", "members", "steps", "where", "starts over"].map((t) => el("th", {}, t)))), el("tbody", {}, rows)));
  const node = detail("plan", `Plan: ${run.stacks.length} stacks`, el("ul", { class: "plain" }, run.plan.map((reason) => el("li", {}, reason))), table);
  node.open = run.stacks.length <= 8;
  return node;
}

function decisionCard(run) {
  if (!run.decisions.length) return null;
  const time = (t) => new Date(t * 1000).toLocaleTimeString();
  return detail("decisions", `Decisions of the driver: ${run.decisions.length}`, el("ul", { class: "plain" }, run.decisions.slice(-60).reverse().map((d) => el("li", {}, `${time(d.time)} ${d.key.replace("_", " ")}, stack ${d.stack}${d.reason ? `: ${d.reason}` : ""}`))));
}

function detail(id, title, ...content) { return el("details", { class: "card", id: `detail-${id}` }, el("summary", {}, title), ...content); }

// --- comparison -----------------------------------------------------------------------------------------------------

async function showCompare(ids) {
  const runs = await Promise.all(ids.map((id) => get("api/run?id=" + encodeURIComponent(id))));
  where.textContent = `${ids.length} runs side by side`;
  const curves = (key) => runs.map((run, i) => (run.curves[key]?.step.length ? { ...ensembleSeries(run.curves[key], ids[i], `c${i % 5}`), range: [] } : null)).filter(Boolean);
  const card = (key) => el("section", { class: "card" }, el("h2", {}, key), chart({ series: curves(key), label: `${key} of ${ids.length} runs`, xLabel: "step", yLabel: "nats per example" }), legend(ids.map((id, i) => [id, `c${i % 5}`])));
  const keys = [...new Set(runs.flatMap((run) => (run.outcome.metrics || []).map((m) => m.key)))];
  const value = (run, key) => (run.outcome.metrics || []).find((m) => m.key === key);
  const rows = keys.map((key) => el("tr", {}, el("td", {}, key, " ", { lower: "↓", higher: "↑" }[value(runs.find((r) => value(r, key)), key).better] || ""), runs.map((run) => el("td", { class: "number" }, number(value(run, key)?.value)))));
  main.replaceChildren(el("h1", {}, "Comparison"), el("div", { class: "grid" }, card("train/nll"), card("val/nll")),
    el("section", { class: "card scroll" }, el("table", { id: "compared" }, el("thead", {}, el("tr", {}, el("th", {}, "metric"), ids.map((id, i) => el("th", { class: `number c${i % 5}` }, el("a", { href: "#/run/" + encodeURIComponent(id) }, id.split("/").pop()))))), el("tbody", {}, rows))));
  return runs.some((run) => run.status === "running");
}

// --- what is shown, and how often it is asked for -------------------------------------------------------------------

async function refresh() {
  clearTimeout(timer);
  const hash = location.hash.slice(1) || "/", [, view, rest] = hash.match(/^\/(\w*)\/?(.*)$/) || [];
  if (hash !== shown) { main.replaceChildren(el("p", { class: "dim" }, "Reading …")); shown = hash; if (view === "run") { chosen = new Set(); } window.scrollTo(0, 0); }
  let busy = false;
  try {
    if (view === "run") busy = await showRun(decodeURIComponent(rest));
    else if (view === "compare") busy = await showCompare(rest.split(",").filter(Boolean).map(decodeURIComponent));
    else busy = await showList();
    live.textContent = busy ? "live" : "";
  } catch (error) {
    live.textContent = `no answer: ${error.message}`;
    if (main.textContent === "Reading …") main.replaceChildren(el("p", {}, error.message));
  }
  timer = setTimeout(refresh, busy ? POLL_MS : IDLE_MS);
}

window.addEventListener("hashchange", refresh);
refresh();

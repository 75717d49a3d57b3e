"use strict";
// Draws the study that stands in the page. What is shown is chosen in the form and kept in the address (#system=...).

const study = JSON.parse(document.getElementById("study").textContent);
const KEYS = ["system", "model", "trace", "level", "figure", "scope"];
const SCOPES = { level: "this load", scenario: "all loads here", study: "the whole study" };
const byId = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const layoutBase = { margin: { l: 60, r: 20, t: 30, b: 50 }, font: { size: 12 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false };
const choice = {};

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  const digits = size > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(size)), 0), 6) : 0;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function options(key) {
  if (key === "figure") return study.figures.map((f) => f.name);
  if (key === "scope") return Object.keys(SCOPES);
  const rank = KEYS.indexOf(key);
  const fits = study.groups.filter((g) => KEYS.slice(0, rank).every((k) => k === "figure" || k === "scope" || g[k] === choice[k]));
  return unique(fits.map((g) => g[key]));
}

function label(key, value) {
  if (key === "figure") return study.figures.find((f) => f.name === value).title;
  return key === "scope" ? SCOPES[value] : value;
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const key of KEYS) {
    const known = options(key);
    const wanted = asked.get(key) ?? choice[key];
    const usual = key === "level" ? known[known.length - 1] : known[0];
    choice[key] = known.includes(wanted) ? wanted : usual;
  }
}

function fillForm() {
  const form = byId("choice");
  form.replaceChildren();
  for (const key of KEYS) {
    const known = options(key);
    const select = document.createElement("select");
    select.name = key;
    for (const value of known) select.add(new Option(label(key, value), value, false, value === choice[key]));
    select.onchange = () => {
      choice[key] = select.value;
      location.hash = new URLSearchParams(choice).toString();
    };
    const box = document.createElement("label");
    box.append({ level: "load", scope: "wins counted over" }[key] ?? key, select);
    if (known.length < 2) box.hidden = true;
    form.append(box);
  }
}

function table(id, heads, rows) {
  const found = byId(id);
  found.replaceChildren();
  const head = found.createTHead().insertRow();
  for (const text of heads) head.append(Object.assign(document.createElement("th"), { textContent: text }));
  const body = found.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) {
      const td = line.insertCell();
      const value = typeof cell === "number" || cell === null;
      td.textContent = value ? number(cell) : cell;
      if (value) td.dataset.value = String(cell);
    }
  }
}

const group = () => study.groups.find((g) => ["system", "model", "trace", "level"].every((k) => g[k] === choice[k]));
const figure = () => study.figures.find((f) => f.name === choice.figure);
const policyOf = (i) => study.policies[i];

function drawRanking() {
  const { name, title, sign } = figure();
  const here = group().policies.map((p) => ({ policy: p.policy, ...p.figures[name] })).filter((p) => p.mean !== null);
  here.sort((a, b) => sign * (b.mean - a.mean) || a.policy - b.policy);
  const bars = [...here].reverse();
  const reach = (p, end) => (p[end] === null ? 0 : Math.abs(p[end] - p.mean));
  Plotly.react("ranking-plot", [{
    type: "bar", orientation: "h",
    y: bars.map((p) => policyOf(p.policy).label), x: bars.map((p) => p.mean),
    marker: { color: bars.map((p) => policyOf(p.policy).colour) },
    error_x: { type: "data", symmetric: false, array: bars.map((p) => reach(p, "high")), arrayminus: bars.map((p) => reach(p, "low")) },
    hovertemplate: "%{y}: %{x:.4g}<extra></extra>",
  }], { ...layoutBase, margin: { ...layoutBase.margin, l: 150 }, xaxis: { title: { text: title }, rangemode: "tozero" } }, CONFIG);
  table("ranking", ["policy", title, "low", "high"], here.map((p) => [policyOf(p.policy).label, p.mean, p.low, p.high]));
}

function winShares() {
  const { name, sign } = figure();
  const same = { study: [], scenario: ["system", "model", "trace"], level: ["system", "model", "trace", "level"] }[choice.scope];
  const groups = study.groups.filter((g) => same.every((k) => g[k] === choice[k]));
  const count = study.policies.length;
  const wins = Array.from({ length: count }, () => new Array(count).fill(0));
  const runs = Array.from({ length: count }, () => new Array(count).fill(0));
  for (const g of groups) {
    for (const seed of g.seeds) {
      for (const a of seed) {
        for (const b of seed) {
          const [x, y] = [a.figures[name], b.figures[name]];
          if (a.policy === b.policy || x === null || y === null) continue;
          runs[a.policy][b.policy] += 1;
          wins[a.policy][b.policy] += x === y ? 0.5 : sign * (x - y) > 0 ? 1 : 0;
        }
      }
    }
  }
  return { shares: wins.map((row, i) => row.map((w, j) => (runs[i][j] ? w / runs[i][j] : null))), runs };
}

function drawWins() {
  const { shares, runs } = winShares();
  const labels = study.policies.map((p) => p.label);
  Plotly.react("wins-plot", [{
    type: "heatmap", z: shares, x: labels, y: labels, zmin: 0, zmax: 1, colorscale: "RdBu", reversescale: true, customdata: runs,
    texttemplate: "%{z:.2f}", hovertemplate: "%{y} beats %{x}: %{z:.3f} of %{customdata} runs<extra></extra>",
  }], { ...layoutBase, margin: { ...layoutBase.margin, l: 150, b: 90 }, yaxis: { autorange: "reversed" } }, CONFIG);
  table("wins", ["beats", ...labels], shares.map((row, i) => [labels[i], ...row]));
}

function drawLoads() {
  const { name, title } = figure();
  const groups = study.groups.filter((g) => ["system", "model", "trace"].every((k) => g[k] === choice[k]));
  const traces = study.policies.map((policy, i) => {
    const points = groups.map((g) => [g.x, g.policies.find((p) => p.policy === i)]).filter(([, p]) => p && p.figures[name].mean !== null);
    const values = points.map(([, p]) => p.figures[name]);
    return {
      name: policy.label, x: points.map(([x]) => x), y: values.map((v) => v.mean), mode: "lines+markers",
      line: { color: policy.colour },
      error_y: { type: "data", symmetric: false, thickness: 1, array: values.map((v) => (v.high ?? v.mean) - v.mean), arrayminus: values.map((v) => v.mean - (v.low ?? v.mean)) },
    };
  });
  Plotly.react("load-plot", traces, { ...layoutBase, xaxis: { title: { text: study.x_title } }, yaxis: { title: { text: title }, rangemode: "tozero" } }, CONFIG);
}

function drawGrid(id, panels, rowsCount, draw, axes) {
  const columns = Math.ceil(panels.length / rowsCount);
  const layout = { ...layoutBase, grid: { rows: rowsCount, columns, pattern: "independent" }, annotations: [], showlegend: true };
  const traces = [];
  panels.forEach((panel, i) => {
    const n = i === 0 ? "" : String(i + 1);
    layout["xaxis" + n] = { ...axes.x, title: { text: panel.title, standoff: 5 } };
    layout["yaxis" + n] = { ...axes.y, ...panel.y };
    for (const trace of draw(panel)) traces.push({ ...trace, xaxis: "x" + n, yaxis: "y" + n, showlegend: i === 0 });
  });
  Plotly.react(id, traces, layout, CONFIG);
}

function line(i, x, y) {
  const policy = policyOf(i);
  return { name: policy.label, legendgroup: String(i), x, y, mode: "lines", line: { color: policy.colour, width: 1.6 } };
}

function drawLatencies() {
  const panels = [["ttft_s", "time to first token (s)"], ["tpot_s", "time per output token (s)"], ["e2e_s", "end to end (s)"]];
  const draw = ({ name }) => group().policies.filter((p) => p.cdf[name].x.length).map((p) => line(p.policy, p.cdf[name].x, p.cdf[name].y));
  drawGrid("latency-plot", panels.map(([name, title]) => ({ name, title })), 1, draw, { x: { type: "log" }, y: { range: [0, 1.02] } });
}

function drawTime() {
  const shown = group();
  const panels = Object.entries(study.time_titles).filter(([name]) => shown.policies.some((p) => p.time && p.time[name].some((v) => v > 0)));
  const draw = ({ name }) => shown.policies.filter((p) => p.time).map((p) => line(p.policy, p.time.at_s, p.time[name]));
  drawGrid("time-plot", panels.map(([name, title]) => ({ name, title: title + " over time (s)" })), 2, draw, { x: {}, y: { rangemode: "tozero" } });
}

function drawAll() {
  readAddress();
  fillForm();
  drawRanking();
  drawWins();
  drawLoads();
  drawLatencies();
  drawTime();
  document.body.dataset.drawn = new URLSearchParams(choice).toString();
}

byId("facts").textContent = study.facts;
byId("config").textContent = study.config;
byId("config-link").href = "data:application/json;charset=utf-8," + encodeURIComponent(study.config);
byId("failures").hidden = study.failed.length === 0;
table("failed", ["run", "error"], study.failed.map((f) => [f.run, f.error]));
if (study.groups.length) {
  window.addEventListener("hashchange", drawAll);
  drawAll();
}

// The page of a condu-ray server: asks the same interface as everybody else, and keeps nothing.

const $ = (id) => document.getElementById(id);
const VIEWS = ["ask", "tasks", "versions", "interface"];
const COLOURS = ["#2a9d8f", "#e9a23b", "#7a6ff0", "#d1495b", "#4f8edc", "#8ab17d", "#b565a7", "#c97b4a"];
const BASE = "#98948a";
let token = sessionStorage.getItem("token");
let tasks = [];

/** Makes an element; text is never read as markup. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const colour = (task) => (task === null ? BASE : COLOURS[Math.max(0, tasks.findIndex((t) => t.name === task)) % COLOURS.length]);

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** Calls the server; throws an Error with the sentence that it gives. */
async function call(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401) {
    $("entry").hidden = false;
    $("token").focus();
  }
  const document = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(document.detail || `The server answers ${response.status}.`);
  return document;
}

// ---- views

function show() {
  const wanted = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "ask";
  for (const name of VIEWS) {
    $(name).hidden = name !== wanted;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    name === wanted ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  if (wanted === "versions") load(loadVersions);
  if (wanted === "interface") load(loadInterface);
}

async function load(what) {
  try {
    await what();
  } catch (error) {
    notice(error.message);
  }
}

async function loadStanding() {
  let said = "no replica is up yet";
  try {
    const ready = await call("readyz");
    const fault = ready.replicas.map((each) => each.fault).find(Boolean);
    said = `version ${ready.serving}` + (fault ? ` — a newer one cannot be loaded: ${fault}` : "");
    if (ready.serving !== loadStanding.version) await loadTasks(ready.serving);
    loadStanding.version = ready.serving;
  } catch (error) {
    said = error.message;
  }
  if ($("standing").textContent !== said) $("standing").textContent = said;
}

// ---- ask

const asked = []; // pictures on the page, the newest first: { file, url, element }

function question() {
  const form = new FormData();
  const space = document.querySelector("input[name=space]:checked").value;
  if (space === "task") form.append("task", $("task").value);
  if (space === "labels") {
    const labels = $("labels").value.split(",").map((label) => label.trim()).filter(Boolean);
    if (!labels.length) return null;
    labels.forEach((label) => form.append("labels", label));
  }
  return form;
}

function add(files) {
  for (const file of files) {
    const image = make("img", { alt: "" });
    image.src = URL.createObjectURL(file);
    const element = make("article", { class: "answer", "aria-busy": "true" }, image, make("div", {}, make("p", {}, "asking …")));
    $("answers").prepend(element);
    asked.unshift({ file, element });
    ask(asked[0]);
  }
  while (asked.length > 24) {
    const { element } = asked.pop();
    URL.revokeObjectURL(element.querySelector("img").src);
    element.remove();
  }
}

async function ask(one) {
  const form = question();
  if (!form) return;
  form.append("image", one.file, one.file.name || "pasted");
  const turn = (one.turn = (one.turn || 0) + 1); // a later question overtakes an earlier one
  one.element.setAttribute("aria-busy", "true");
  let body;
  try {
    const said = await call("v1/predict", { method: "POST", body: form });
    body = answer(said.answers[0], said.milliseconds);
  } catch (error) {
    body = make("div", {}, make("h3", {}, "No answer"), make("p", {}, error.message));
  }
  if (turn !== one.turn) return;
  one.element.lastChild.replaceWith(body);
  one.element.removeAttribute("aria-busy");
}

function answer(said, milliseconds) {
  const where = said.task ? `${said.task} · ` : "";
  const took = Object.values(milliseconds).reduce((sum, each) => sum + each, 0);
  const bars = said.labels.map((each) =>
    make("li", {},
      make("svg", { "aria-hidden": "true" }, make("rect", { width: `${Math.max(0.5, 100 * each.probability)}%`, height: "100%" })),
      make("span", {}, each.label, each.task ? make("small", {}, ` ${each.task}`) : ""),
      make("span", { class: "number" }, percent(each.probability))));
  return make("div", {},
    make("h3", {}, said.label),
    make("p", { class: "hint" }, `${where}${said.image} · version ${said.version} · ${took.toFixed(0)} ms`),
    make("ul", { class: "bars", "aria-label": "Likeliest labels" }, ...bars),
    make("h4", {}, "Who voted"), ...voters(said.votes));
}

function voters(votes) {
  const name = (vote) => vote.task ?? "base model";
  let start = 0;
  const picture = make("svg", { class: "voters", role: "img", "aria-label": `Votes: ${votes.map((v) => `${name(v)} ${percent(v.weight)}`).join(", ")}` });
  for (const vote of votes) {
    const part = make("rect", { x: `${100 * start}%`, width: `${100 * vote.weight}%`, height: "100%" });
    part.style.fill = colour(vote.task);
    picture.append(part);
    start += vote.weight;
  }
  const list = votes.map((vote) => {
    const dot = make("rect", { width: "100%", height: "100%", rx: "3" });
    dot.style.fill = colour(vote.task);
    const near = vote.similarity === null ? "" : `, nearness ${vote.similarity.toFixed(2)}`;
    return make("li", {}, make("svg", { "aria-hidden": "true" }, dot), `${name(vote)} ${percent(vote.weight)}${near}`);
  });
  return [picture, make("ul", { class: "who" }, ...list)];
}

// ---- tasks

async function loadTasks(version) {
  tasks = (await call(`v1/tasks?version=${version}`)).tasks;
  const chosen = $("task").value;
  $("task").replaceChildren(...tasks.map((task) => make("option", { value: task.name }, task.name)));
  if (tasks.some((task) => task.name === chosen)) $("task").value = chosen;
  const cards = tasks.map((task) => {
    const figures = [["zero-shot", "zero_shot"], ["alone", "own"], ["now", "expert"], ["kept", "gain_kept"]];
    const shown = figures.flatMap(([word, key]) => {
      const value = task.figures[key];
      return [make("dt", {}, word), make("dd", {}, value == null ? "–" : value.toFixed(1))];
    });
    const chips = task.prototypes.slice(0, 12).map((each) =>
      make("li", {}, each.label, make("small", {}, ` ${each.pictures}`)));
    const rest = task.prototypes.length - chips.length;
    return make("article", { class: "card" },
      make("h3", {}, task.name),
      make("p", { class: "hint" }, `${task.classes.length} classes, ${task.pictures.train} pictures, learned in version ${task.learned_in}`),
      make("dl", { class: "figures" }, ...shown),
      make("ul", { class: "chips", "aria-label": `Classes of ${task.name}, with pictures` }, ...chips, ...(rest ? [make("li", {}, `and ${rest} more`)] : [])));
  });
  $("task-list").replaceChildren(cards.length ? make("div", { class: "cards" }, ...cards) : "Nothing yet: condu-ray learn NAME --data PATH");
}

// ---- versions

async function loadVersions() {
  const said = await call("v1/versions");
  const head = make("tr", {}, ...["Version", "What", "Tasks", "Made"].map((word) => make("th", { scope: "col" }, word)));
  const rows = said.versions.toReversed().map((each) => {
    const row = make("tr", {},
      make("td", {}, String(each.version) + (each.version === said.serving ? " (serves)" : "")),
      make("td", {}, each.message || each.kind), make("td", {}, each.tasks.join(", ") || "none"),
      make("td", {}, new Date(each.created).toLocaleString()));
    if (each.version === said.serving) row.className = "serving";
    return row;
  });
  $("version-list").replaceChildren(make("div", { class: "scroll", role: "region", "aria-label": "All versions", tabindex: "0" },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  $("matrix").replaceChildren(said.accuracy ? heat(said.accuracy) : "No accuracy was measured yet.");
}

function heat(matrix) {
  const head = make("tr", {}, make("td"), ...matrix.tasks.map((task) => make("th", { scope: "col" }, task)));
  const rows = matrix.values.map((row, r) => make("tr", {}, make("th", { scope: "row" }, matrix.tasks[r]),
    ...row.map((value, c) => {
      const cell = make("td", r === c ? { class: "own" } : {}, value === null ? "–" : value.toFixed(1));
      if (value !== null) {
        cell.style.backgroundColor = `hsl(178 45% ${96 - 0.36 * value}%)`; // dark letters can be read on all of them
        cell.style.color = "#102022";
      }
      return cell;
    })));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

// ---- interface

async function loadInterface() {
  $("curl").textContent = `curl -F image=@picture.jpg ${token ? '-H "Authorization: Bearer $TOKEN" ' : ""}${new URL("v1/predict", document.baseURI)}`;
  const api = await call("openapi.json");
  const rows = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, what]) =>
    make("li", {}, make("code", {}, `${method.toUpperCase()} ${path}`), ` ${what.description ?? what.summary}`)));
  $("routes").replaceChildren(make("ul", {}, ...rows));
}

// ---- events

addEventListener("hashchange", show);
for (const id of ["files", "camera"]) {
  $(id).addEventListener("change", (event) => {
    add(event.target.files);
    event.target.value = "";
  });
}
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) {
    location.hash = "ask";
    add(files);
  }
});
for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  addEventListener(name, (event) => {
    event.preventDefault(); // dropped beside the field, a picture would replace the page
    $("drop").classList.toggle("over", over);
    if (name === "drop") add(event.dataTransfer.files);
  });
}
$("question").addEventListener("submit", (event) => event.preventDefault());
$("question").addEventListener("change", (event) => {
  if (event.target.type === "file") return;
  const space = document.querySelector("input[name=space]:checked").value;
  $("choose-task").hidden = space !== "task";
  $("choose-labels").hidden = space !== "labels";
  asked.forEach(ask);
});
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  sessionStorage.setItem("token", token);
  $("entry").hidden = true;
  notice("");
  start();
});

async function start() {
  await loadStanding();
  show();
}
start();
setInterval(() => document.hidden || loadStanding(), 5000);

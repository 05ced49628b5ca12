const $ = (id) => document.getElementById(id);
const make = (tag, props, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed"];
const POLL_MS = 3000;
// {prompt, answers: [text]}, the newest last
const turns = [];
let states = [];
// The AbortController of the turn that is being answered.
let running = null;
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("ja") ? "ja" : "en");
let t = TEXTS[language];

// Words

const number = (value, digits = 1) => value.toLocaleString(language, { maximumFractionDigits: digits });
const seconds = (ms) => number(ms / 1000, ms < 10000 ? 2 : 1);

function translate() {
  t = TEXTS[language];
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t[node.dataset.t];
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = t[node.dataset.label];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t[node.dataset.placeholder];
  $("language").textContent = t.other;
  $("language").lang = language === "ja" ? "en" : "ja";
  showButtons();
  showHint();
  showStates();
}

function showHint(error) {
  const isOfKey = error?.status === 401;
  $("hint").classList.toggle("error", isOfKey);
  $("hint").textContent = isOfKey ? error.message : t.key_hint;
}

function showButtons() {
  $("send").textContent = running ? t.stop : t.send;
  $("panel-button").textContent = $("panel").classList.contains("open") ? t.close : t.settings;
}

// Models and their state

async function loadModels() {
  try {
    const { data } = await get("v1/models");
    for (const select of [$("model-0"), $("model-1")]) fillModels(select, data);
    notice(data.length ? null : new Error(t.none));
    showHint();
  } catch (error) {
    notice(error);
    if (error.status === 401) openPanel(true, $("key"));
    showHint(error);
  }
  showStates();
  showCurl();
}

function fillModels(select, models) {
  const before = select.value;
  const ids = models.map(({ id }) => id).join();
  // A list that is open stays open.
  if (select.dataset.ids === ids) return;
  select.dataset.ids = ids;
  const groups = new Map();
  for (const { id, parent } of models) {
    const base = parent ?? id;
    if (!groups.has(base)) groups.set(base, make("optgroup", { label: base }));
    groups.get(base).append(make("option", { value: id, textContent: parent ? id.slice(base.length + 1) : id }));
  }
  select.replaceChildren(...groups.values());
  if (models.some(({ id }) => id === before)) select.value = before;
  else if (select.id === "model-1") select.selectedIndex = Math.min(1, models.length - 1);
}

async function poll() {
  if (document.hidden) return;
  try {
    const { models, gpus } = await get("state");
    states = models;
    $("gpus").hidden = !gpus.total;
    $("gpus").textContent = t.gpus(number(gpus.used, 2), number(gpus.total));
    if ($("notice").dataset.about === "offline") await loadModels();
  } catch (error) {
    states = [];
    if (!error.status) notice(new Error(t.offline), "offline");
  }
  showStates();
}

const stateOf = (model) => states.find((state) => state.model === model.split(":")[0]);

function wordsOf(state) {
  const share = state.num_gpus && t.share(number(state.num_gpus, 3), state.accelerator_type ?? "GPU");
  return [t[state.phase], t.replicas(state.num_running, state.max_replicas), share].filter(Boolean).join(" · ");
}

function showStates() {
  $("states").replaceChildren(...states.map((state) => make("li", {},
    make("span", { className: `dot ${state.phase}` }), make("b", { textContent: state.model }),
    make("small", { textContent: wordsOf(state) }))));
  const chosen = new Set(chosenModels().map(stateOf).filter(Boolean));
  const words = [...chosen].map((state) => make("span", {}, make("span", { className: `dot ${state.phase}` }),
    `${state.model} · ${wordsOf(state)}`));
  // Only what is new is said again by a screen reader.
  if ($("now").textContent !== words.map((word) => word.textContent).join("")) $("now").replaceChildren(...words);
}


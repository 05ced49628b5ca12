function openPanel(isOpen, focus) {
  const isOver = isOpen && $("panel-button").checkVisibility(); // on a wide screen it stands beside the chat
  $("panel").classList.toggle("open", isOver);
  $("panel-button").ariaExpanded = isOver;
  document.querySelector("main").inert = isOver;
  showButtons();
  focus?.focus();
}

function submit() {
  const prompt = $("prompt").value.trim();
  if (running) return running.abort();
  if (!prompt || !$("model-0").value) return;
  $("prompt").value = "";
  fitPrompt();
  send(prompt);
}

function fitPrompt() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function startAgain() {
  running?.abort();
  turns.length = 0;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("prompt").focus();
  showCurl();
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("prompt").onkeydown = (event) => {
  const isComposing = event.isComposing || event.keyCode === 229; // Safari ends the composition before its Enter
  const isLine = event.shiftKey || matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || isComposing || isLine) return;
  event.preventDefault();
  if (!running) submit();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort();
  else openPanel(false);
};
$("prompt").oninput = fitPrompt;
document.oninput = showCurl;
$("language").onclick = () => {
  language = language === "ja" ? "en" : "ja";
  localStorage.setItem("language", language);
  translate();
  showCurl();
};
$("new").onclick = startAgain;
$("panel-button").onclick = () => openPanel(!$("panel").classList.contains("open"));
$("compare").onclick = () => {
  $("model-1").hidden = !$("model-1").hidden;
  $("compare").ariaPressed = !$("model-1").hidden;
  showStates();
  showCurl();
};
for (const idea of document.querySelectorAll(".idea")) {
  idea.onclick = () => {
    $("prompt").value = idea.textContent;
    submit();
  };
}
$("model-0").onchange = $("model-1").onchange = showStates;
$("settings").onsubmit = (event) => event.preventDefault();
$("copy").onclick = () => copy($("curl").textContent, $("copy"));
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => {
  sessionStorage.setItem("key", $("key").value.trim());
  loadModels().then(poll).then(() => $("notice").hidden && openPanel(false));
};
document.onvisibilitychange = poll;
// Back from where an adapter may have been trained.
window.onfocus = loadModels;
translate();
loadModels().then(poll);
setInterval(poll, POLL_MS);

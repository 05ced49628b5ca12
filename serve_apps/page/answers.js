// Requests

const chosenModels = () => [$("model-0"), $("model-1")].filter((select) => !select.hidden).map(({ value }) => value);

function bodyOf(model, side, prompt) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const answer = turn.answers[side] ?? turn.answers[0];
    if (answer) messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: answer });
  }
  messages.push({ role: "user", content: prompt });
  const set = SETTINGS.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]);
  return { model, messages, ...Object.fromEntries(set), stream: true, stream_options: { include_usage: true } };
}

function curlOf(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = $("key").value.trim() ? `  -H "Authorization: Bearer $KAJIYA_API_KEY" \\\n` : "";
  const url = new URL("v1/chat/completions", location.href);
  return `curl -N ${url} \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '${quoted}'`;
}

function showCurl() {
  const prompt = $("prompt").value || t.idea_1;
  $("curl").textContent = chosenModels().map((model, side) => curlOf(bodyOf(model, side, prompt))).join("\n\n");
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that came over plain HTTP from another host has no clipboard
    const field = make("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = t.copied;
  setTimeout(() => (button.textContent = t.copy), 1500);
}

// Answers

async function send(prompt) {
  running = new AbortController();
  const bodies = chosenModels().map((model, side) => bodyOf(model, side, prompt));
  const answers = make("div", { className: "answers" });
  const asked = make("p", { className: "prompt", textContent: prompt });
  $("empty").hidden = true;
  $("chat").append(make("div", { className: "turn" }, asked, answers));
  showButtons();
  const views = bodies.map((body) => new AnswerView(body.model, answers));
  scrollDown(true);
  await Promise.all(bodies.map((body, side) => answer(body, views[side])));
  const texts = views.map((view) => view.text.textContent);
  if (answers.isConnected) turns.push({ prompt, answers: texts });
  if (answers.isConnected && !texts.some(Boolean)) $("prompt").value ||= prompt; // to be mended and sent again
  running = null;
  showButtons();
  showCurl();
}

async function answer(body, view) {
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal };
  try {
    const response = await fetch("v1/chat/completions", request);
    if (!response.ok) throw await refusalOf(response);
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw Object.assign(new Error(event.error.message), { notes: [event.error.code] });
      view.read(event);
    }
  } catch (error) {
    if (error.name === "AbortError") view.end = "stopped";
    else view.fail(error instanceof TypeError ? new Error(t.offline) : error);
  }
  view.finish();
}

class AnswerView {
  constructor(model, parent) {
    this.model = model;
    this.begin = performance.now();
    this.title = make("h3", { textContent: model });
    this.thought = make("div", { className: "text" });
    this.thinking = make("details", { className: "thinking", hidden: true },
      make("summary", { textContent: t.thinking }), this.thought);
    this.text = make("div", { className: "text" });
    this.meta = make("span");
    this.copy = make("button", { type: "button", textContent: t.copy, hidden: true });
    this.copy.onclick = () => copy(this.text.textContent, this.copy);
    this.node = make("article", { className: "answer" }, this.title, this.thinking, this.text,
      make("footer", {}, this.meta, this.copy));
    this.timer = setInterval(() => this.wait(), 250);
    parent.append(this.node);
  }

  wait() {
    const phase = stateOf(this.model)?.phase ?? "running";
    this.meta.textContent = (phase === "running" ? t.waiting_for : t.waking)(seconds(performance.now() - this.begin));
  }

  read({ model, choices, usage }) {
    if (model) this.title.textContent = model;
    this.usage = usage ?? this.usage;
    const { delta = {}, finish_reason: reason } = choices[0] ?? {};
    this.end = reason ?? this.end;
    const thought = delta.reasoning_content ?? "";
    const text = delta.content ?? "";
    if (!thought && !text) return;
    if (this.first === undefined) {
      this.first = performance.now();
      clearInterval(this.timer);
      this.meta.textContent = t.first(seconds(this.first - this.begin));
    }
    this.thinking.hidden &&= !thought;
    this.thought.append(thought);
    this.text.append(text);
    scrollDown(false);
  }

  fail(error) {
    const notes = make("small", { textContent: (error.notes ?? []).filter(Boolean).join(" · ") });
    this.text.after(make("p", { className: "error", role: "alert" }, error.message, notes));
  }

  finish() {
    clearInterval(this.timer);
    const now = performance.now();
    const parts = [];
    if (this.first !== undefined) {
      const num = this.usage?.completion_tokens;
      parts.push(t.first(seconds(this.first - this.begin)));
      if (num > 1) parts.push(t.speed(number(((num - 1) * 1000) / (now - this.first))));
      if (num) parts.push(t.tokens(number(num)));
      parts.push(t.total(seconds(now - this.begin)));
    }
    if (this.end === "stopped" || this.end === "length") parts.push(t[this.end]);
    this.meta.textContent = parts.join(" · ");
    this.node.classList.add("done");
    this.copy.hidden = !this.text.textContent;
    scrollDown(false);
  }
}

function scrollDown(always) {
  const chat = $("chat");
  if (always || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 120) chat.scrollTop = chat.scrollHeight;
}

function notice(error, about = "") {
  $("notice").hidden = !error;
  $("notice").dataset.about = about;
  $("notice").className = "error";
  $("notice").textContent = error?.message ?? "";
}

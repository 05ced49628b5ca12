function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusalOf(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? { message: response.statusText || `HTTP ${response.status}` };
  const retry = response.headers.get("retry-after");
  const id = response.headers.get("x-request-id");
  const notes = [response.status, error.code, error.param, retry && t.retry(retry), id && t.request_id(id)];
  return Object.assign(new Error(error.message), { status: response.status, notes });
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error(t.cut);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// The server's own interface, as any client of it would use it: the list of models and a streamed chat.

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message ?? message; } catch { /* no JSON: the status has to do */ }
  throw new ApiError(response.status, message);
}

export async function models(key) {
  const response = await checked(await fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data.map((model) => model.id);
}

// Server-sent events as parsed JSON, one for each "data:" line; ends at [DONE].
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const number = (text) => (String(text).trim() === "" || Number.isNaN(Number(text)) ? undefined : Number(text));

// Yields {reasoning, text, tokens, finish, usage, timings, progress}, each where there is something of it.
export async function* chat({ model, messages, settings, key, signal, goesOn }) {
  const body = {
    model, messages, stream: true, stream_options: { include_usage: true },
    ...(goesOn ? { continue_final_message: true, add_generation_prompt: false } : {}),
    ...(settings.logprobs ? { logprobs: true, top_logprobs: 6 } : {}),
    ...Object.fromEntries(["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"]
      .map((name) => [name, number(settings[name])])),
  };
  const ask = async () => checked(await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }));
  const response = await ask().catch((error) => {
    if (!body.logprobs || !String(error.message).includes("logprobs")) throw error;
    delete body.logprobs;  // a model that writes by denoising has none
    delete body.top_logprobs;
    return ask();
  });
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError(event.error.code ?? 500, event.error.message);
    const choice = event.choices?.[0];
    yield {
      reasoning: choice?.delta?.reasoning_content ?? "",
      text: choice?.delta?.content ?? "",
      tokens: choice?.logprobs?.content ?? [],
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
      timings: event.timings ?? null,
    };
  }
}

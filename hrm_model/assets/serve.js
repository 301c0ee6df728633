"use strict";
// Whatever a person or the model wrote becomes text by textContent and nothing else: it cannot be markup.
const at = (id) => document.getElementById(id);
const most = Number(document.body.dataset.steps);
let history = [], running = null;

const made = (name, kind, text) => {
  const element = document.createElement(name);
  element.className = kind;
  element.textContent = text;
  return element;
};

for (let n = 1; n <= most; n++) at("legend").append(made("span", "t d" + n, String(n)));
at("numbers").addEventListener("change", () => at("talk").classList.toggle("numbers", at("numbers").checked));

const say = (text, bad = false) => {
  at("status").textContent = text;
  at("status").className = bad ? "bad" : "";
};

const busy = (is) => {
  at("send").disabled = is;
  at("stop").disabled = !is;
  at("talk").ariaBusy = String(is); // read out as an answer, not as a hundred tokens
};

function request() {
  const asked = { model: document.body.dataset.model, messages: history, stream: true, top_k: 50, top_p: 0.95 };
  for (const name of ["temperature", "max_tokens", "seed", "force_steps"]) {
    const value = at(name).value.trim();
    if (value !== "") asked[name] = Number(value);
  }
  return asked;
}

async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: "the server said " + response.status };
  }
}

async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function post(signal) {
  const headers = { "content-type": "application/json" };
  if (at("key").value) headers.authorization = "Bearer " + at("key").value;
  for (;;) {
    const response = await fetch("v1/chat/completions", { method: "POST", headers, signal, body: JSON.stringify(request()) });
    if (response.ok) return response;
    const error = await refusal(response);
    // the oldest question and answer make room; the last question stays
    if (error.code === "context_length_exceeded" && history.length > 2) history = history.slice(2);
    else throw new Error(error.message);
  }
}

class Answer {
  constructor() {
    this.turn = made("div", "turn answer", "");
    this.facts = made("p", "facts", "");
    at("talk").append(this.turn, this.facts);
    this.text = "";
    this.steps = [];
    this.waiting = [];
    this.begun = performance.now();
  }

  // Tokens whose text is not certain yet (half a character, the beginning of a stop string) wait for the next.
  take(text, steps) {
    this.steps.push(...steps);
    this.waiting.push(...steps);
    if (!text) return;
    const depth = Math.max(1, ...this.waiting), shown = made("span", "t d" + depth, text);
    shown.dataset.n = String(depth);
    shown.title = depth === 1 ? "1 step" : depth + " steps";
    if (this.waiting.length > 1) shown.title = this.waiting.join(", ") + " steps";
    this.waiting = [];
    // who has scrolled up to read stays there
    const page = document.documentElement, below = page.scrollHeight - window.innerHeight - window.scrollY;
    this.turn.append(shown);
    this.text += text;
    const mean = this.steps.reduce((a, b) => a + b, 0) / this.steps.length;
    const rate = this.steps.length / ((performance.now() - this.begun) / 1000);
    this.facts.textContent = this.steps.length + " tokens, " + mean.toFixed(2) + " steps a token, " + rate.toFixed(1) + " tokens/s";
    if (below < 40) window.scrollTo(0, page.scrollHeight);
  }
}

async function ask(question) {
  const mine = running = new AbortController(), turn = made("div", "turn user", question);
  history.push({ role: "user", content: question });
  at("talk").append(turn);
  window.scrollTo(0, document.documentElement.scrollHeight);
  say("");
  busy(true);
  let answer = null, ended = false;
  try {
    const response = await post(mine.signal);
    answer = new Answer();
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      for (const choice of piece.choices) {
        answer.take(choice.delta.content || "", choice.hrm ? choice.hrm.steps : []);
        if (choice.finish_reason === "length") say("cut: more tokens allow longer answers");
      }
    }
    if (!ended) throw new Error("the connection ended before the answer did");
    if (!answer.text.trim()) say("the model answered with white space alone");
  } catch (error) {
    if (running !== mine) return; // a new conversation has begun: nothing of this one belongs to it
    if (error.name === "AbortError") say("stopped");
    else if (error instanceof TypeError) say("the server cannot be reached, or the connection broke", true);
    else say(error.message, true);
  }
  if (answer) history.push({ role: "assistant", content: answer.text });
  else {
    // nothing was answered: the question is there to be sent again
    history.pop();
    turn.remove();
    if (!at("question").value) at("question").value = question;
  }
  running = null;
  busy(false);
  at("question").focus();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value;
  if (running || !question.trim()) return;
  at("question").value = "";
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running && running.abort());
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  running = null;
  history = [];
  at("talk").replaceChildren();
  say("");
  busy(false);
});

// The page of `trl label`: asks the server for one item after the other and sends what is answered. Texts are only ever
// put in as text. An answer that could not be sent stays here and is sent again.
"use strict";

const $ = (id) => document.getElementById(id);
const CHOICES = {
  rate: [1, 2, 3, 4, 5].map((mark) => ({
    value: mark, key: String(mark), label: ["bad", "poor", "fair", "good", "great"][mark - 1], kind: mark < 3 ? "bad" : mark > 3 ? "good" : "",
  })),
  approve: [
    { value: false, key: "1", also: "ArrowLeft", label: "bad", kind: "bad" },
    { value: true, key: "2", also: "ArrowRight", label: "good", kind: "good" },
  ],
  compare: [
    { value: 0, key: "1", also: "ArrowLeft", label: "A is better" },
    { value: "tie", key: "3", also: "ArrowDown", label: "no difference" },
    { value: 1, key: "2", also: "ArrowRight", label: "B is better" },
  ],
  correct: [{ value: null, key: "Ctrl ⏎", label: "keep this text" }],
};
const TITLES = { rate: "How good is it?", approve: "Good or bad?", compare: "Which is better?", correct: "Correct it" };
const KEYS = {
  rate: [["1 … 5", "from bad to great"]],
  approve: [["1 or ←", "bad"], ["2 or →", "good"]],
  compare: [["1 or ←", "A is better"], ["2 or →", "B is better"], ["3 or ↓", "no difference"]],
  correct: [["Ctrl Enter", "keep the text"], ["Esc", "leave the text field, for the other keys"]],
};
const COMMON = [["s", "skip"], ["u", "undo the last answer"], ["g", "guidelines"], ["p", "people and agreement"], ["?", "these keys"]];
const POLL = 300;

let state = null;
let busy = false;
let timer = 0;

const name = {
  get: () => new URLSearchParams(location.search).get("rater") || localStorage.getItem("rater") || "",
  set: (value) => localStorage.setItem("rater", value),
};

// ---- the server ----

async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ rater: name.get(), ...body }) };
  const response = await fetch(path, options || {});
  const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    show(await call(path, body));
    notice("");
  } catch (error) {
    notice(error instanceof TypeError ? "The server cannot be reached. Nothing is lost: answer again when it is back." : error.message);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

const next = () => send(`/api/next?rater=${encodeURIComponent(name.get())}`);

async function poll() {
  if (busy || document.hidden) return again();
  try {
    const fresh = await call(`/api/next?rater=${encodeURIComponent(name.get())}`);
    if (!state.item) show(fresh);
    notice("");
  } catch (error) {
    notice("The run has ended, or the server cannot be reached.");
    again();
  }
}

function again() {
  clearTimeout(timer);
  timer = setTimeout(poll, POLL);
}

// ---- what is seen ----

function show(fresh) {
  state = fresh;
  const { item, progress, task } = state;
  $("hello").hidden = true;
  $("work").hidden = $("actions").hidden = !item;
  $("rest").hidden = Boolean(item);
  $("title").textContent = TITLES[task];
  $("who").textContent = name.get();
  $("show-guidelines").hidden = !state.guidelines;
  $("guidelines-text").textContent = state.guidelines;
  $("count").textContent = `${progress.done.toLocaleString("en")} of ${progress.total.toLocaleString("en")}`;
  const bar = document.querySelector(".bar");
  bar.setAttribute("aria-valuemax", progress.total);
  bar.setAttribute("aria-valuenow", progress.done);
  bar.firstElementChild.style.width = `${progress.total ? (100 * progress.done) / progress.total : 0}%`;
  people(progress);
  clearTimeout(timer);
  if (item) ask(item, task, state.before);
  else rest(progress);
}

function ask(item, task, before) {
  $("work").dataset.item = item.key;
  $("prompt").replaceChildren(...content(item.prompt));
  $("prompt").hidden = !item.prompt.length;
  const letters = item.completions.length > 1;
  $("completions").className = letters ? "pair" : "";
  $("completions").replaceChildren(...item.completions.map((completion, i) => card(completion, letters && "AB"[i], i)));
  $("choices").replaceChildren(...CHOICES[task].map((choice) => button(choice, before)));
  $("editor").hidden = task !== "correct";
  if (task === "correct") {
    $("text").value = typeof before === "string" ? before : item.text;
    $("text").focus();
  } else if (document.activeElement) document.activeElement.blur();
  scrollTo(0, 0);
}

function content(value) {
  if (typeof value === "string") return [document.createTextNode(value)];
  return value.map((message) => {
    const role = element("span", "role", message.role || "");
    const said = typeof message.content === "string" ? message.content : JSON.stringify(message.content);
    return element("div", "message", role, said);
  });
}

function card(completion, letter, place) {
  const parts = completion.length ? content(completion) : [element("span", "empty", "(empty)")];
  const made = element("article", "completion", ...(letter ? [element("span", "letter", letter)] : []), ...parts);
  if (letter) made.addEventListener("click", () => getSelection().isCollapsed && answer(place));
  return made;
}

function button({ value, key, label, kind }, before) {
  const made = element("button", kind || "", element("b", "", ...(state.task === "rate" ? [key] : [label])));
  made.type = "button";
  if (state.task === "rate") made.append(element("span", "", label));
  else made.append(element("kbd", "", key));
  if (before !== undefined && before !== null && before === value) made.classList.add("before");
  made.addEventListener("click", () => answer(value));
  return made;
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function rest(progress) {
  const waiting = state.live || (progress.done < progress.total && progress.left > 0);
  $("rest-title").textContent = waiting ? "Nothing to judge right now" : "That is all. Thank you!";
  $("rest-text").textContent = state.live
    ? "The model is learning from your answers. What it writes next comes here by itself."
    : waiting
      ? "Somebody else is looking at what is left."
      : `You gave ${progress.answered.toLocaleString("en")} answers. They are kept; this page can be closed.`;
  $("revisit").hidden = !progress.skipped || state.live;
  $("actions").hidden = state.live || !progress.answered;
  $("choices").replaceChildren();
  if (waiting) again();
}

function people(progress) {
  const rows = Object.entries(progress.raters).sort((a, b) => b[1] - a[1]);
  $("people").querySelector("tbody").replaceChildren(
    ...rows.map(([rater, count]) => element("tr", "", element("td", "", rater), element("td", "", count.toLocaleString("en")))));
  const found = progress.agreement;
  $("agreement").textContent = !found
    ? "No item has been answered by two people, so how well they agree is not known."
    : `On ${found.items.toLocaleString("en")} items that several people answered, ${Math.round(100 * found.share)} % of answers are equal`
      + (found.alpha === null ? "." : `; Krippendorff’s α is ${found.alpha.toFixed(2)} (1: full agreement, 0: as by chance).`);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- what is done ----

function answer(value) {
  if (!state || !state.item) return;
  send("/api/answer", { item: state.item.key, value: state.task === "correct" ? $("text").value : value });
}
const skip = () => state && state.item && send("/api/skip", { item: state.item.key });
const undo = () => state && send("/api/undo", {});

$("skip").addEventListener("click", skip);
$("undo").addEventListener("click", undo);
$("revisit").addEventListener("click", () => send("/api/revisit", {}));
for (const id of ["guidelines", "people", "keys"]) $(`show-${id}`).addEventListener("click", () => open(id));
$("leave").addEventListener("click", () => {
  $("people").close();
  greet();
});
$("hello").addEventListener("submit", (event) => {
  event.preventDefault();
  name.set($("name").value.trim());
  next();
});

function open(id) {
  if (id === "keys")
    $("keys").querySelector("tbody").replaceChildren(
      ...[...(state ? KEYS[state.task] : []), ...COMMON].map(([key, what]) => element("tr", "", element("td", "", element("kbd", "", key)), element("td", "", what))));
  if (id !== "guidelines" || (state && state.guidelines)) $(id).showModal();
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || !$("hello").hidden || event.repeat) return;
  if (event.target.id === "text") {
    if (event.key === "Escape") event.target.blur();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) answer();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !state) return;
  const choice = CHOICES[state.task].find(({ key, also }) => event.key === key || event.key === also);
  const command = { s: skip, u: undo, g: () => open("guidelines"), p: () => open("people"), "?": () => open("keys") }[event.key];
  if (!choice && !command) return;
  event.preventDefault();
  if (choice) answer(choice.value);
  else command();
});

function greet() {
  $("work").hidden = $("rest").hidden = $("actions").hidden = true;
  $("hello").hidden = false;
  $("name").value = localStorage.getItem("rater") || "";
  $("name").focus();
}

if (name.get()) next();
else greet();

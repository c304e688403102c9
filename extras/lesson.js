// ─── The page of the lesson ───────────────────────────────────────────────────────────────────
// A part that shows what the model does with the prompt has a box to change the prompt. The first
// part says that all boxes hold the same.
function addPrompts() {
  document.querySelector(".live .quiet")?.append(
    " All panels of this page share one prompt: what you type in one of them is in all of them.");
  for (const panel of all(".live")) {
    if (panel.querySelector(".prompt, .history")) continue;
    const box = element("textarea", {className: "prompt", rows: 1, spellcheck: false,
                                     autocomplete: "off", maxLength: 20000});
    const label = element("label", {}, "Prompt ", box);
    panel.querySelector("h4").after(panel.querySelector(".sliders .bars, #temperature")
                                    ? writeRow(label) : label);
  }
}

function writeRow(label) {
  return element("div", {className: "write"}, label, element("div", {className: "row"},
    element("button", {className: "main continue"}, "Continue"),
    element("button", {className: "stop", disabled: true}, "Stop"),
    element("span", {className: "readout speed", role: "status"})));
}

// The table of contents marks the step that is being read: the last one that has begun in the upper
// third of the window, or above it.
function followReader() {
  const links = new Map(all("#contents a").map(link => [link.hash.slice(1), link]));
  const steps = [...links.keys()].map($), menu = $("menu");
  let marked = null;
  const mark = () => {
    const line = window.innerHeight / 3;
    const current = steps.findLast(step => step.getBoundingClientRect().top < line);
    const link = links.get(current?.id);
    menu.textContent = link ? `Step ${link.textContent.trim().replace(" ", ": ")}` : "Contents";
    if (link === marked) return;
    marked?.removeAttribute("aria-current");
    link?.setAttribute("aria-current", "step");
    marked = link;
  };
  document.addEventListener("scroll", mark, {passive: true});
  new ResizeObserver(mark).observe(document.body);        // begins with a call
}

function listenToMenu() {
  const menu = $("menu"), list = $("contents");
  const open = value => {
    menu.setAttribute("aria-expanded", value);
    list.classList.toggle("open", value);
  };
  menu.onclick = () => open(menu.getAttribute("aria-expanded") !== "true");
  list.onclick = event => {
    if (event.target.closest("a")) open(false);
  };
  menu.parentElement.addEventListener("keydown", event => {
    if (event.key !== "Escape" || menu.getAttribute("aria-expanded") !== "true") return;
    open(false);
    menu.focus();
  });
}

// A box with code of the workshop opens below the name that was clicked.
function placeBoxes() {
  let clicked = null;
  document.addEventListener("click", event => {
    clicked = event.target.closest("[popovertarget]") ?? clicked;
  }, true);
  for (const box of all(".box")) {
    box.addEventListener("toggle", event => {
      if (event.newState !== "open" || !clicked) return;
      const name = clicked.getBoundingClientRect(), {offsetWidth, offsetHeight} = box;
      const farthest = document.documentElement.clientWidth - offsetWidth - 8;
      const left = Math.max(8, Math.min(name.left, farthest));
      const below = name.bottom + 6, above = name.top - offsetHeight - 6;
      box.style.left = `${left}px`;
      box.style.top = `${below + offsetHeight > window.innerHeight && above > 8 ? above : below}px`;
    });
  }
}

// On paper, all answers are open.
function openWhenPrinted() {
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    for (const details of opened) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
}

addPrompts();
followReader();
listenToMenu();
placeBoxes();
openWhenPrinted();

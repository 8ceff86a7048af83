// Asks the daemon again and again, and shows what it says.
//
// Counters are asked for every two seconds, all else less often. What takes the daemon longer, the
// more volumes there are, has a pause after it that is ten times as long as it took. Nothing is
// asked while nobody looks.

import { Refused, ask } from "./api.js";
import { setHidden, setText } from "./dom.js";
import { duration, moment, time } from "./format.js";
import { CELLS } from "./map.js";
import { Measurements } from "./measurements.js";
import { Overview } from "./overview.js";
import { VolumeView } from "./volume.js";

const TICK = 2_000;
const SURVEY = 4_000; // least pause between two surveys
const MAP = 8_000; // and between two maps
const FACTOR = 10; // a pause is at least so many times as long as the answer took
const SLOWEST = 10_000; // between two tries, while the daemon does not answer
const LONG_ABSENCE = 30_000; // of the one who looks: rates over it would say nothing

const $ = (id) => document.getElementById(id);

const state = { status: null, volumes: null, measurements: new Measurements() };
const overview = new Overview();
let view = null;
let goneSince = null;
let lastAnswer = 0;

class Turn {
  constructor(pause) {
    this.pause = pause;
    this.next = 0;
  }

  get due() {
    return performance.now() >= this.next;
  }

  async take(work) {
    const begun = performance.now();
    try {
      return await work();
    } finally {
      const now = performance.now();
      this.next = now + Math.max(this.pause, FACTOR * (now - begun));
    }
  }
}

const turns = { measure: new Turn(0), survey: new Turn(SURVEY), map: new Turn(MAP) };

async function survey() {
  const [status, volumes] = [await ask("status"), await ask("volumes")];
  Object.assign(state, { status, volumes });
}

async function drawMap() {
  const drawn = view;
  const info = state.volumes?.volumes.find((volume) => volume.name === drawn.name);
  if (info === undefined) return;
  const now = VolumeView.stateOf(info);
  if (drawn.drawn === now && info.clients === 0) return; // nobody writes to it
  if (drawn.drawn !== undefined && !turns.map.due) return;
  try {
    await turns.map.take(async () => {
      const map = await ask("volumes", drawn.name, "map", { cells: CELLS });
      const { snapshots } = await ask("volumes", drawn.name, "snapshots");
      drawn.showMap(map, snapshots);
    });
    drawn.drawn = now;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    drawn.failed(error.message);
    drawn.drawn = undefined;
  }
}

function render() {
  const { status } = state;
  if (status !== null) {
    const since = duration((Date.now() - moment(status.started).getTime()) / 1000);
    setText($("daemon"), `${status.version} · ${status.data} · up ${since}`);
  }
  if (view === null) overview.show(state);
  else view.show(state);
}

function answered() {
  lastAnswer = performance.now();
  goneSince = null;
  setHidden($("gone"), true);
  document.body.classList.remove("stale");
  setText($("state"), "live");
  $("state").className = "live";
}

function unanswered(error) {
  goneSince ??= new Date();
  state.measurements.forget();
  const why =
    error instanceof Refused
      ? `The daemon refuses: ${error.message}`
      : `The daemon has not answered since ${time(goneSince)}; what is shown is from before.`;
  setText($("gone"), `${why} Trying again…`);
  setHidden($("gone"), false);
  document.body.classList.add("stale");
  setText($("state"), "no answer");
  $("state").className = "lost";
}

async function tick() {
  if (performance.now() - lastAnswer > LONG_ABSENCE) state.measurements.forget();
  if (turns.measure.due) {
    const measure = async () => state.measurements.take(await ask("measurements"));
    await turns.measure.take(measure);
  }
  if (turns.survey.due) await turns.survey.take(survey);
  if (view !== null) await drawMap();
  answered();
  render();
}

async function run() {
  let pause = TICK;
  for (;;) {
    if (!document.hidden) {
      try {
        await tick();
        pause = TICK;
      } catch (error) {
        unanswered(error);
        pause = Math.min(SLOWEST, 1.5 * pause);
      }
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, pause);
    });
  }
}

let wake = () => {};

function route() {
  const found = /^#volume\/(.+)$/.exec(location.hash);
  let name = null;
  try {
    name = found && decodeURIComponent(found[1]);
  } catch {
    name = null; // somebody's own idea of a link
  }
  if (name === null) {
    const before = view?.name;
    view = null;
    document.title = "nbdserve";
    setHidden($("volume"), true);
    setHidden($("overview"), false);
    render();
    if (before !== undefined) {
      const links = [...$("volumes").querySelectorAll("tbody a")];
      links.find((link) => link.textContent === before)?.focus();
    }
  } else if (view?.name !== name) {
    view = new VolumeView($("volume"), name);
    document.title = `${name} – nbdserve`;
    setHidden($("overview"), true);
    setHidden($("volume"), false);
    render();
    window.scrollTo(0, 0);
    $("volume").querySelector("h1").focus({ preventScroll: true });
    wake();
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("content").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && view !== null) location.hash = "";
  if (event.key === "/" && view === null && event.target.tagName !== "INPUT") {
    event.preventDefault();
    $("filter").focus();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) wake();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  overview.chart.draw();
  view?.redraw();
});
window.addEventListener("hashchange", route);
route();
run();

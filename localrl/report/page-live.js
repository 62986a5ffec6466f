// Follows a run: asks the page's own server for the page, and puts what changed into this one.
function follow() {
  const LEAST_MS = 2000; // between two looks
  const SHARE = 20; // a look takes at most a twentieth of the time: the run needs the machine
  const LONG_MS = 15000; // after a failure, or when the run has ended
  const sources = {};
  for (const part of document.querySelectorAll("[data-part]")) sources[part.id] = part.outerHTML;
  let [version, changed, problem, timer] = [null, new Date(), "", 0];

  async function look() {
    clearTimeout(timer);
    const began = performance.now();
    let wait = LEAST_MS;
    try {
      const headers = version ? { "If-None-Match": version } : {};
      const answer = await fetch(location.pathname, { headers, cache: "no-store" });
      if (answer.status === 200) {
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
        if (version) changed = new Date();
        version = answer.headers.get("ETag");
      }
      problem = [200, 304].includes(answer.status) ? "" : await answer.text();
      wait = Math.max(LEAST_MS, SHARE * (performance.now() - began));
    } catch {
      problem = "The server of this page does not answer: it was ended, or cannot be reached.";
    }
    if (problem || hasEnded()) wait = Math.max(wait, LONG_MS);
    tell();
    if (!document.hidden) timer = setTimeout(look, wait);
  }

  function hasEnded() {
    const state = document.querySelector(".state").classList;
    return state.contains("finished") || state.contains("stopped");
  }

  function tell() {
    const ago = Math.round((Date.now() - changed) / 1000);
    const last = `last change at ${changed.toLocaleTimeString()}${ago < 10 ? "" : `, ${ago} s ago`}`;
    const state = hasEnded() ? "The run has ended" : "Following the run";
    $("live").textContent = problem ? `${problem} Trying again; ${last}.` : `${state}; ${last}.`;
    $("live").classList.toggle("warning", problem !== "");
  }

  // Only parts whose source changed are replaced, so that the page stays where it is.
  function replace(page) {
    data = JSON.parse(page.getElementById("data").textContent);
    const focused = document.activeElement?.dataset?.chart;
    for (const part of page.querySelectorAll("[data-part]")) {
      const source = part.outerHTML;
      if (sources[part.id] === source) continue;
      sources[part.id] = source;
      $(part.id).replaceWith(document.adoptNode(part));
      part.querySelectorAll("svg.chart").forEach(readable);
    }
    const chart = focused && document.querySelector(`svg[data-chart="${focused}"]`);
    if (chart && chart !== document.activeElement) chart.focus({ preventScroll: true });
    explorer.update(data.groups);
  }

  document.addEventListener("visibilitychange", () => document.hidden || look());
  setInterval(tell, 5000);
  timer = setTimeout(look, LEAST_MS);
}

// Filters the figure of methods/index.html. Plain JavaScript: it works from a folder, and without it all methods are shown.
(() => {
  const form = document.getElementById("method-filter");
  if (!form) return;
  const sizes = JSON.parse(form.dataset.sizes);
  const methods = [...document.querySelectorAll(".methods > li")].map((element) => ({
    element,
    ...element.dataset,
    budgets: JSON.parse(element.dataset.budgets),
  }));
  const sections = [...document.querySelectorAll(".way, .category")];
  const exact = ["category", "mergeable", "perRow", "needsData", "mark"];

  // The choices live in the address, so that a filtered figure can be sent to somebody.
  const chosen = () => Object.fromEntries([...new FormData(form)].map(([name, value]) => [camel(name), value.trim()]));
  const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());

  const share = (method, host) => (100 * method.budgets[host]) / sizes[host];

  function fits(method, wanted) {
    if (exact.some((name) => wanted[name] && method[name] !== wanted[name])) return false;
    if (wanted.name && !method.name.includes(wanted.name.toLowerCase())) return false;
    const hosts = wanted.host ? [wanted.host] : Object.keys(method.budgets);
    if (wanted.host && !(wanted.host in method.budgets)) return false;
    return !wanted.budget || hosts.some((host) => share(method, host) <= Number(wanted.budget));
  }

  function size(method, host) {
    const named = host in method.budgets ? host : Object.keys(method.budgets)[0];
    if (!named) return "size by its options";
    return `${method.budgets[named].toLocaleString("en")} in ${named}`;
  }

  function show() {
    const wanted = chosen();
    let count = 0;
    for (const method of methods) {
      const fit = fits(method, wanted);
      method.element.hidden = !fit;
      method.element.querySelector(".size").textContent = size(method, wanted.host);
      count += fit;
    }
    for (const section of sections) {
      const empty = !section.querySelector(".methods > li:not([hidden])");
      section.hidden = empty;
      if (section.matches(".category")) section.previousElementSibling.hidden = empty;
    }
    document.getElementById("method-count").textContent = `${count} of ${methods.length} methods`;
    document.getElementById("method-none").hidden = count > 0;
    const told = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    history.replaceState(null, "", `${told.size ? `?${told}` : location.pathname}${location.hash}`);
  }

  for (const [name, value] of new URLSearchParams(location.search)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  show();
})();

// Pages in a folder may not start workers; the theme's search is one. There, its script runs in a hidden frame instead.
// The theme would fetch such a substitute from a network, unless a file of this name is configured (`polyfills` in mkdocs.yml).
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const script = new URL(address, document.baseURI).href;
      // In a worker, postMessage speaks to whoever started it.
      const start = `<script>window.postMessage = (data) => parent.postMessage(data, "*");<\/script>`;
      this.frame.srcdoc = `${start}<script src="${script}"><\/script>`;
      this.frame.addEventListener("load", () => {
        this.ready = true;
        for (const data of this.waiting) this.postMessage(data);
      });
      addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        this.onmessage?.(message);
      });
      const add = () => document.body.append(this.frame);
      if (document.body) add();
      else addEventListener("DOMContentLoaded", add);
    }

    postMessage(data) {
      // The frame's own function is the one that speaks to this page.
      if (this.ready) window.postMessage.call(this.frame.contentWindow, data, "*");
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}

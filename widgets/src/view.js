// What every view does in one way: it draws what Python sends, tells Python what a user asks for, and goes away cleanly.

/** A page that follows a model. A subclass builds its page into `this.root`, then calls `listen`. */
export class View {
  constructor(model) {
    this.model = model;
  }

  /** Draw now, and again whenever a trait changes: `redraw` is trait -> function. Python hears that the page is there. */
  listen(redraw) {
    for (const [trait, draw] of Object.entries(redraw)) this.model.on(`change:${trait}`, draw);
    this.off = () => Object.entries(redraw).forEach(([trait, draw]) => this.model.off(`change:${trait}`, draw));
    for (const draw of new Set(Object.values(redraw))) draw();
    this.root.dataset.painted = "true";
    this.send({ type: "ready" });
  }

  close() {
    this.off();
  }

  send(message) {
    this.model.send(message);
  }

  /** Show the error that Python told, if any, on `this.error`. */
  drawError() {
    const { error } = this.model.get("status");
    this.error.textContent = error ?? "";
    this.error.hidden = !error;
  }
}

/** The module that anywidget loads for a view. */
export const widget = (Page) => ({
  render({ model, el }) {
    const view = new Page(model, el);
    return () => view.close();
  },
});

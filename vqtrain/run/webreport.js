"use strict";
// Draws the curves of a report and shows one epoch's pictures; all of the data is in the page.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const drawn = [];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const DASHES = ["solid", "dashed"];

  function figure(format, log) {
    const plot = Bokeh.Plotting.figure({
      height: 230, sizing_mode: "stretch_width", toolbar_location: null, tools: [],
      y_axis_type: log ? "log" : "linear", background_fill_color: null, border_fill_color: null,
      outline_line_color: null, min_border_right: 12,
    });
    const [x, y] = [plot.xaxis, plot.yaxis].map((axes) => axes.items ? axes.items[0] : axes[0] ?? axes);
    for (const axis of [x, y]) {
      axis.major_label_text_color = colour("--ink");
      axis.major_label_text_font_size = "13px";
      axis.axis_label_text_color = colour("--soft");
      axis.axis_label_text_font_style = "normal";
      for (const part of ["axis_line_color", "major_tick_line_color"]) axis[part] = colour("--soft");
      axis.minor_tick_line_color = null;
    }
    for (const grid of [...plot.xgrid, ...plot.ygrid]) grid.grid_line_color = colour("--line");
    x.ticker = new Bokeh.BasicTicker({min_interval: 1});
    x.formatter = new Bokeh.NumeralTickFormatter({format: "0,0"});
    y.formatter = new Bokeh.NumeralTickFormatter({format});
    return [plot, x, y];
  }

  function hover(plot, renderers, tooltips, many) {
    const line_policy = "nearest";
    plot.add_tools(new Bokeh.HoverTool({
      renderers, tooltips, line_policy, mode: many ? "vline" : "mouse", attachment: "horizontal",
    }));
  }

  function curves({name, label, format, lines}) {
    const [plot, x] = figure(format, false);
    const columns = {epoch: data.epochs};
    lines.forEach((line, i) => { columns[`line${i}`] = line.values; });
    const source = new Bokeh.ColumnDataSource({data: columns});
    const many = data.epochs.length > 1;
    const found = lines.map((line, i) => {
      const how = {source, color: colour(line.kind ? "--second" : "--accent")};
      const [at, over] = [{field: "epoch"}, {field: `line${i}`}];
      const dots = plot.scatter(at, over, {...how, size: many ? 4 : 8});
      const path = plot.line(at, over, {...how, line_width: 2, line_dash: DASHES[line.kind]});
      return many ? path : dots;
    });
    const told = lines.map((line, i) => [line.name, `@line${i}{${format}}`]);
    hover(plot, [found[0]], [["epoch", "@epoch"], ...told], many);
    x.axis_label = "epoch";
    show(plot, `curve-${name}`);
  }

  function use() {
    const [plot, x, y] = figure("0.[000]%", true);
    y.ticker.desired_num_ticks = 4;
    const source = new Bokeh.ColumnDataSource({data: {ranks: [1], shares: [1]}});
    const how = {source, color: colour("--accent")};
    const [at, over] = [{field: "ranks"}, {field: "shares"}];
    plot.scatter(at, over, {...how, size: 4});
    const path = plot.line(at, over, {...how, line_width: 2});
    const line = {line_color: colour("--second"), line_dash: "dashed", line_width: 2};
    const [alike, perplexity] = ["width", "height"].map((dimension) => new Bokeh.Span({dimension, ...line}));
    plot.add_layout(alike);
    plot.add_layout(perplexity);
    hover(plot, [path], [["code", "@ranks"], ["of all tokens", "@shares{0.[000]%}"]], true);
    x.axis_label = "codes, the most used first";
    show(plot, "use");
    return (told) => {
      source.data = {ranks: told.ranks, shares: told.shares};
      alike.location = 1 / told.codes;
      perplexity.location = told.perplexity;
    };
  }

  function show(plot, id) {
    const place = document.getElementById(id);
    place.replaceChildren();
    drawn.push(Bokeh.Plotting.show(plot, place));
  }

  const slider = document.getElementById("epoch");
  let fill = null;

  function turn() {
    const shown = data.shown[slider.value];
    slider.setAttribute("aria-valuetext", `epoch ${shown.epoch}`);
    document.getElementById("epoch-shown").textContent = shown.epoch;
    for (const [kind, address] of Object.entries(shown.pictures)) {
      const picture = document.getElementById(`picture-${kind}`);
      picture.src = address;
      picture.alt = picture.dataset.alt.replace("{epoch}", shown.epoch);
    }
    if (!fill) return;
    document.getElementById("use-told").textContent = shown.use ? shown.use.told : "Not recorded in this epoch.";
    document.getElementById("use").hidden = !shown.use;
    if (shown.use) fill(shown.use);
  }

  function draw() {
    for (const views of drawn.splice(0)) views.then((views) => [views].flat().forEach((view) => view.remove()));
    data.panels.forEach(curves);
    fill = document.getElementById("use") && use();
    if (slider) turn();
    return Promise.all(drawn);
  }

  if (slider) {
    slider.addEventListener("input", turn);
    document.getElementById("slider").hidden = false;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw().then(() => { document.body.dataset.drawn = ""; });
})();

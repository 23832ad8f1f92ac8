"""A panel of train/curves.py as inline SVG: axes, error bars, and what a pointer shows over it.

Standard library only. The colours are the page's, by class: "curve main", "curve other", "curve faint".
"""

import json

from infer.markup import Html, join, tag
from train.curves import thinned, words

WIDTH, HEIGHT = 400, 240  # units of the drawing, of which one is about a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 380, 12, 214  # within what the labels take
READINGS = 400  # of a chart; more would lie within one unit


def chart(panel, x):
    """A curves.Panel and its axis of steps -> Html, a figure."""
    y = panel.axis

    def x_of(step):
        return round(LEFT + x.place(step) * (RIGHT - LEFT), 1)

    def y_of(value):
        return round(BOTTOM - y.place(value) * (BOTTOM - TOP), 1)

    drawing = [tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="rule")]
    for value, text in y.ticks(6):
        level = y_of(value)
        drawing.append(tag("line", x1=LEFT, x2=RIGHT, y1=level, y2=level, class_="rule" if value else "axis"))
        drawing.append(tag("text", minus(text), x=LEFT - 8, y=level + 4, text_anchor="end"))
    for step, text in x.ticks(5):
        drawing.append(tag("text", text, x=x_of(step), y=BOTTOM + 18, text_anchor="middle"))
    for curve in panel.curves:
        points = thinned(curve.steps, curve.values, RIGHT - LEFT)
        shapes = [tag("polyline", points=" ".join(f"{x_of(step)},{y_of(value)}" for step, value in points))]
        for step, (low, high) in zip(curve.steps, curve.ranges() if curve.errors else ()):
            shapes.append(tag("line", x1=x_of(step), x2=x_of(step), y1=y_of(low), y2=y_of(high)))
        if curve.errors or len(curve.steps) == 1:
            shapes += [tag("circle", cx=x_of(s), cy=y_of(value), r=3) for s, value in zip(curve.steps, curve.values)]
        drawing.append(tag("g", *shapes, class_=f"curve {curve.looks}"))
    drawing.append(tag("line", class_="guide", y1=TOP, y2=BOTTOM, x1=0, x2=0))
    title = f"{panel.title[0].upper()}{panel.title[1:]}"
    said = _readings(panel.curves)
    svg = tag(
        "svg",
        *drawing,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex=0,
        aria_label=f"{title}: {said[0][1]}; {said[-1][1]}",
        data_points=json.dumps([[x_of(step), text] for step, text in said]),
    )
    names = [tag("span", curve.name, class_=f"key {curve.looks}") for curve in panel.curves]
    keys = tag("span", join(names), class_="keys") if len(names) > 1 else ""
    caption = tag("figcaption", tag("strong", title), keys)
    return tag("figure", caption, svg, tag("output", Html("&nbsp;")), class_="chart")


def minus(text):
    """A number's words with the sign that is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _readings(curves):
    """[(step, "step 10: each step 0.1, mean 0.12")] for evenly chosen steps that any of the curves has a value at."""
    steps = sorted({step for curve in curves for step in curve.steps}, reverse=True)
    said = {step: [] for step in reversed(steps[:: len(steps) // READINGS + 1])}
    for curve in curves:
        for step, value, error in zip(curve.steps, curve.values, curve.errors or [None] * len(curve.steps)):
            if step in said:
                spread = "" if error is None else f" ± {words(error)}"
                said[step].append(minus(f"{curve.name} {words(value)}{spread}"))
    return [(step, f"step {step:,}: {', '.join(some)}") for step, some in said.items()]

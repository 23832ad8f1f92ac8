"""A curve as inline SVG: axes, ticks with round numbers, error bars, and what a pointer shows over it.

Standard library only. The colours are the page's, by class: "curve main", "curve other", "curve faint".
"""

import json
import math
from dataclasses import dataclass

from infer.markup import Html, join, tag

WIDTH, HEIGHT = 400, 240  # units of the drawing, of which one is about a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 12, 26  # what the labels take around the curves
MOST_POINTS = 400  # of a curve; more would lie within one pixel


@dataclass(frozen=True)
class Curve:
    """points: [(x, y)] in the order of x. errors: the standard error of each y, or nothing. looks: its class."""

    name: str
    points: list
    looks: str = "main"
    errors: tuple = ()


def chart(title, curves, zero=False):
    """Curves over training steps in one drawing -> Html, a figure. zero: whether the value 0 is in sight."""
    curves = [curve for curve in curves if curve.points]
    last_step = max(x for curve in curves for x, _ in curve.points)
    y_ticks = ticks(*_reach(curves, zero), 5)
    x_of = _scale(0, last_step, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    drawing = [
        *(
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y_of(y), y2=y_of(y), class_="axis" if y == 0 else "rule")
            for y in y_ticks
        ),
        *(tag("text", number(y), x=LEFT - 8, y=y_of(y) + 4, text_anchor="end") for y in y_ticks),
        *(
            tag("text", f"{x:,.0f}", x=x_of(x), y=HEIGHT - BOTTOM + 18, text_anchor="middle")
            for x in ticks(0, last_step, 5)
            if x <= last_step and x == int(x)
        ),
        *(_line(curve, x_of, y_of) for curve in curves),
        tag("line", class_="guide", y1=TOP, y2=HEIGHT - BOTTOM, x1=0, x2=0),
    ]
    legend = join(tag("span", curve.name, class_=f"key {curve.looks}") for curve in curves)
    first, last = (curves[-1].points[i] for i in (0, -1))
    told = f"{title}: {curves[-1].name} {number(first[1])} at step {first[0]:,}, {number(last[1])} at step {last[0]:,}"
    svg = tag(
        "svg",
        *drawing,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex=0,
        aria_label=told,
        data_points=json.dumps(_readings(curves, x_of)),
    )
    keys = tag("span", legend, class_="keys") if len(curves) > 1 else ""
    caption = tag("figcaption", tag("strong", title), keys)
    return tag("figure", caption, svg, tag("output", Html("&nbsp;")), class_="chart")


def thinned(points, most=MOST_POINTS):
    """At most `most` of the points, evenly, the last one always."""
    every = math.ceil(len(points) / most) or 1
    return points[::-1][::every][::-1]


def means(points, count):
    """Each y replaced by the mean of the last `count`, its own among them."""
    totals = [0.0]
    for _, y in points:
        totals.append(totals[-1] + y)
    starts = [max(0, i + 1 - count) for i in range(len(points))]
    return [(x, (totals[i + 1] - totals[s]) / (i + 1 - s)) for i, ((x, _), s) in enumerate(zip(points, starts))]


def ticks(low, high, about):
    """Round numbers around [low, high], about so many, the first not above low and the last not below high."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value):
    """A number as a label says it, with three digits that count."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _reach(curves, zero):
    """The values that are in sight: of a faint curve all but the highest hundredth, which would press the rest flat."""
    low, high = [0.0] if zero else [], [0.0] if zero else []
    for curve in curves:
        errors = curve.errors or [0.0] * len(curve.points)
        low += [y - error for (_, y), error in zip(curve.points, errors)]
        highest = sorted(y + error for (_, y), error in zip(curve.points, errors))
        high.append(highest[int(0.99 * (len(highest) - 1))] if curve.looks == "faint" else highest[-1])
    return min(low), max(high)


def _scale(low, high, start, end):
    """A function from [low, high] to the drawing's [start, end]; what is outside lands on the edge."""
    span = high - low or 1.0
    return lambda value: round(start + (end - start) * min(max((value - low) / span, 0), 1), 1)


def _line(curve, x_of, y_of):
    places = [(x_of(x), y_of(y)) for x, y in curve.points]
    drawn = [tag("polyline", points=" ".join(f"{x},{y}" for x, y in places))]
    for (x, _), (_, value), error in zip(places, curve.points, curve.errors):
        drawn.append(tag("line", x1=x, x2=x, y1=y_of(value - error), y2=y_of(value + error)))
    if curve.errors or len(places) == 1:
        drawn += [tag("circle", cx=x, cy=y, r=3) for x, y in places]
    return tag("g", *drawn, class_=f"curve {curve.looks}")


def _readings(curves, x_of):
    """[[place, "step 10: loss 0.1, mean 0.12"]] for every step that any of the curves has a point at."""
    words = {}
    for curve in curves:
        errors = curve.errors or [None] * len(curve.points)
        for (x, y), error in zip(curve.points, errors):
            spread = "" if error is None else f" ± {number(error)}"
            words.setdefault(x, []).append(f"{curve.name} {number(y)}{spread}")
    return [[x_of(x), f"step {x:,}: {', '.join(said)}"] for x, said in sorted(words.items())]

"""Every colour of the toy world, RGB in 0..255: once as the base style has it, once as ink has it."""

COLOURS = {  # what a caption can ask for: (base, ink)
    "red": ((222, 48, 44), (200, 48, 36)),
    "orange": ((244, 132, 30), (230, 126, 40)),
    "yellow": ((250, 208, 50), (236, 194, 70)),
    "green": ((66, 176, 74), (122, 150, 66)),
    "blue": ((52, 116, 226), (66, 120, 168)),
    "purple": ((142, 76, 200), (130, 76, 126)),
    "pink": ((248, 132, 178), (236, 150, 146)),
    "white": ((244, 244, 250), (252, 246, 230)),
}

MATERIALS = {  # (base, ink)
    "eye": ((28, 24, 40), (22, 17, 15)),
    "white": ((255, 255, 255), (252, 246, 230)),
    "cream": ((255, 240, 214), (250, 238, 210)),
    "black": ((58, 50, 66), (48, 36, 32)),
    "wood": ((132, 84, 52), (150, 98, 62)),
    "gold": ((250, 176, 48), (226, 150, 56)),
    "yolk": ((255, 150, 30), (226, 128, 40)),
    "skin": ((252, 208, 170), (244, 206, 160)),
    "blush": ((250, 140, 130), (218, 110, 84)),
    "leaf": ((70, 158, 66), (140, 148, 76)),
    "steel": ((190, 202, 216), (214, 202, 176)),
    "noodle": ((255, 228, 150), (244, 214, 140)),
    "swirl": ((246, 120, 160), (206, 84, 66)),
    "glass": ((150, 214, 246), (240, 222, 172)),
    "cloud": ((255, 255, 255), (252, 244, 224)),
    "sun": ((255, 250, 214), (206, 64, 42)),
    "moon": ((255, 246, 200), (252, 242, 212)),
    "star": ((255, 250, 210), (252, 244, 220)),
    "flake": ((255, 255, 255), (255, 252, 240)),
    "pine": ((38, 112, 66), (130, 136, 80)),
    "frosted pine": ((176, 206, 220), (226, 216, 190)),
    "cactus": ((92, 146, 84), (150, 148, 86)),
    "grass": ((60, 130, 60), (132, 130, 72)),
    "night grass": ((24, 44, 66), (142, 116, 88)),
    "wave": ((190, 232, 250), (96, 118, 120)),
    "bloom": ((250, 90, 120), (206, 64, 42)),
}

PLACES = {  # name: what the caption says, then base and ink as (sky above, sky at the horizon, far ground, near ground)
    "forest": (
        "in the forest",
        ((120, 190, 190), (214, 236, 190), (64, 128, 84), (86, 150, 70)),
        ((244, 230, 198), (244, 230, 198), (182, 172, 114), (204, 184, 124)),
    ),
    "sea": (
        "on the sea",
        ((70, 160, 232), (206, 238, 250), (50, 150, 206), (26, 104, 176)),
        ((244, 230, 198), (244, 230, 198), (178, 188, 172), (150, 168, 160)),
    ),
    "desert": (
        "in the desert",
        ((250, 170, 96), (255, 228, 170), (232, 170, 98), (240, 192, 116)),
        ((244, 230, 198), (244, 230, 198), (226, 180, 118), (238, 206, 150)),
    ),
    "snow": (
        "in the snow",
        ((150, 190, 228), (232, 240, 250), (200, 218, 238), (246, 250, 255)),
        ((238, 222, 188), (238, 222, 188), (232, 222, 200), (251, 245, 230)),
    ),
    "night": (
        "at night",
        ((16, 18, 60), (74, 62, 128), (40, 42, 92), (34, 58, 78)),
        ((206, 178, 138), (206, 178, 138), (174, 144, 110), (188, 158, 120)),
    ),
    "meadow": (
        "in the meadow",
        ((110, 190, 246), (226, 244, 250), (130, 200, 104), (110, 190, 70)),
        ((244, 230, 198), (244, 230, 198), (208, 196, 126), (220, 202, 130)),
    ),
}

INK_LINE = (22, 17, 15)


def mix(a, b, t):
    """The colour a share `t` of the way from a to b."""
    return tuple(x + (y - x) * t for x, y in zip(a, b))


def tinted(colours, towards, share):
    """All colours moved a share of the way towards one."""
    return {name: mix(rgb, towards, share) for name, rgb in colours.items()}


def palette(colour, place, ink=False):
    """Colour name -> RGB of one scene."""
    which = int(ink)
    main = COLOURS[colour][which]
    shadow = (70, 40, 30) if ink else (60, 20, 70)
    colours = {
        "main": main,
        "dark": mix(main, shadow, 0.2 if colour == "white" else 0.26),
        "light": mix(main, (255, 250, 235), 0.55),
    }
    if place == "night" and not ink:
        colours = tinted(colours, (40, 40, 110), 0.12)
    colours |= {name: pair[which] for name, pair in MATERIALS.items()}
    colours |= zip(("sky", "horizon", "far", "near"), PLACES[place][1 + which])
    return colours

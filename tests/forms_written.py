"""Writes a data set in each form as its own documents describe it; knows nothing of the readers."""

import json
import math
from urllib.parse import quote

import numpy as np
from PIL import Image

CLASSES = ["été", "no", "traffic light", "日本語", "007"]
NAMES = ["a.jpg", "b c.png", "straße 7.JPG", "写真.jpeg", "x.y.z.jpg", "d.bmp", "e.webp", "f.tiff"]


def photo(file, height=48, width=64, seed=0, orientation=0):
    """An image of noise; with an EXIF orientation if that is not 0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(noise).save(file, exif=exif)


def random_set(seed):
    """{name: (height, width, [(class, x1, y1, x2, y2)])}, every class in use."""
    rng = np.random.default_rng(seed)
    images = {}
    for i, name in enumerate(rng.permutation(NAMES)[: rng.integers(4, len(NAMES))].tolist()):
        height, width = map(int, rng.integers(33, 90, 2))
        objects = []
        for k in range(int(rng.integers(0, 5)) if i else len(CLASSES)):
            x, y = rng.integers(0, 4 * width - 8) / 4, rng.integers(0, 4 * height - 8) / 4
            w, h = rng.integers(4, 4 * width) / 4, rng.integers(4, 4 * height) / 4
            label = CLASSES[k] if not i else str(rng.choice(CLASSES))
            objects.append(
                (label, *map(float, (x, y, x + w, y + h)))
            )  # may extend beyond the image
        images[name] = height, width, objects
    return images


def photos(folder, images):
    for i, (name, (height, width, _)) in enumerate(images.items()):
        photo(folder / name, height, width, i)


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def voc(root, images):
    photos(root / "JPEGImages", images)
    (root / "Annotations").mkdir(parents=True)
    for name, (height, width, objects) in images.items():
        entries = "".join(
            f"<object>\n<name>{escaped(label)}</name><pose>Left</pose><difficult>0</difficult>\n"
            f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
            "\n</object>\n"
            for label, x1, y1, x2, y2 in objects
        )
        stem = name.rpartition(".")[0]
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><folder>x</folder><filename>{escaped(name)}</filename>\n<size><width>"
            f"{width}</width><height>{height}</height><depth>3</depth></size>\n{entries}"
            "</annotation>",
            "utf-8",
        )


def yolo_lines(height, width, objects):
    return "".join(
        f"{CLASSES.index(label)} {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} "
        f"{(x2 - x1) / width!r} {(y2 - y1) / height!r}\n"
        for label, x1, y1, x2, y2 in objects
    )


def yolo(root, images, end="\n"):
    photos(root / "images" / "all", images)
    (root / "labels" / "all").mkdir(parents=True)
    for name, (height, width, objects) in images.items():
        if objects:
            file = root / "labels" / "all" / f"{name.rpartition('.')[0]}.txt"
            file.write_bytes(yolo_lines(height, width, objects).replace("\n", end).encode())
    listed = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/all\nnames:\n{listed}", "utf-8")


def cvat(root, images):
    photos(root / "images", images)
    labels = "".join(f"<label><name>{escaped(c)}</name></label>" for c in CLASSES)
    text = f"<annotations><version>1.1</version><meta><job><labels>{labels}</labels></job></meta>\n"
    for i, (name, (height, width, objects)) in enumerate(images.items()):
        text += f'<image id="{i}" name="{escaped(name)}" width="{width}" height="{height}">\n'
        for label, x1, y1, x2, y2 in objects:
            text += f'<box label="{escaped(label)}" source="manual" occluded="0" xtl="{x1}" '
            text += f'ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0">\n</box>\n'
        text += "</image>\n"
    (root / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n{text}</annotations>', "utf-8"
    )


def region(label, x1, y1, x2, y2, height, width):
    value = {
        "x": 100 * x1 / width,
        "y": 100 * y1 / height,
        "width": 100 * (x2 - x1) / width,
        "height": 100 * (y2 - y1) / height,
        "rotation": 0,
        "rectanglelabels": [label],
    }
    size = {"original_width": width, "original_height": height, "image_rotation": 0}
    return size | {"type": "rectanglelabels", "value": value}


def label_studio(root, images):
    photos(root / "photos", images)
    tasks = []
    for i, (name, (height, width, objects)) in enumerate(images.items()):
        result = [region(*entry, height, width) for entry in objects]
        done = {"id": i, "was_cancelled": False, "result": result}
        url = f"/data/upload/1/0a1b2c3d-{quote(name)}"
        tasks.append({"id": i, "annotations": [done], "data": {"image": url}, "predictions": []})
    (root / "project-1.json").write_text(json.dumps(tasks))


def label_studio_min(root, images):
    photos(root / "photos", images)
    tasks = []
    for i, (name, (height, width, objects)) in enumerate(images.items()):
        regions = [region(*entry, height, width) for entry in objects]
        flat = [
            {k: v for k, v in r.items() if k.startswith("original")} | r["value"] for r in regions
        ]
        url = f"/data/local-files/?d=photos/{quote(name)}"
        tasks.append({"id": i, "image": url, "lead_time": 3.5, "annotator": 1, "label": flat})
    (root / "min.json").write_text(json.dumps(tasks))


def coco(root, images):
    photos(root / "images", images)
    annotations = [
        (i, CLASSES.index(label), [x1, y1, x2 - x1, y2 - y1])
        for i, (_, _, objects) in enumerate(images.values())
        for label, x1, y1, x2, y2 in objects
    ]
    content = {
        "images": [
            {"id": i, "file_name": f"images\\{name}", "height": height, "width": width}
            for i, (name, (height, width, _)) in enumerate(images.items())
        ],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, "segmentation": []}
            for k, (i, c, box) in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }
    (root / "result.json").write_text(json.dumps(content))


WRITERS = {
    "Pascal VOC": voc,
    "YOLO": yolo,
    "CVAT": cvat,
    "Label Studio": label_studio,
    "Label Studio, JSON-MIN": label_studio_min,
    "COCO": coco,
}


def rotated(x, y, w, h, degrees, around):
    """The upright box around a turned one, corner by corner."""
    t = math.radians(degrees)
    corners = np.array([[x, y], [x + w, y], [x, y + h], [x + w, y + h]]) - around
    turn = np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
    corners = corners @ turn.T + around
    return [*corners.min(0), *corners.max(0)]

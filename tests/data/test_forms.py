"""Data sets in the forms people have: read as they were written, and odd files named."""

import json
import random
import re
import shutil
import unicodedata

import forms_written as written
import numpy as np
import pytest
from forms_written import CLASSES, WRITERS, photo, photos, random_set, region

from gfl_jax.data.coco_format import DataError, check
from gfl_jax.data.forms.folder import divided, read_folder, splits_of
from gfl_jax.errors import InputError, MissingFileError, UserError


def read(root, on_error="raise", **choices):
    """{split: {file name: [(class, x1, y1, x2, y2)]}}, what was said, and the problems."""
    found, said = read_folder(root, choices.pop("form", "auto"), choices.pop("images", ""))
    contents, why = splits_of(found, **choices)
    splits, problems = {}, []
    for name, content in contents.items():
        kept, report = check(content, found.file, found.folder, on_error)
        names = report.category_names
        problems += [str(problem) for problem in report.problems]
        splits[name] = {
            entry.filename: [(names[o.label], *o.box) for o in entry.objects] for entry in kept
        }
    return splits, "\n".join([said, why, *found.notes]), problems


def refused(root, **choices):
    with pytest.raises(InputError) as error:
        read(root, **choices)
    return str(error.value)


def together(splits):
    assert not splits["train"].keys() & splits["val"].keys()
    return {name.rpartition("/")[2]: o for split in splits.values() for name, o in split.items()}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_in_a_form_is_read_equal(tmp_path, form, seed):
    images = random_set(seed)
    WRITERS[form](tmp_path, images)
    splits, said, problems = read(tmp_path)
    assert f"is read as {form.split(',')[0]}, because of" in said
    assert problems == []
    found = together(splits)
    assert found.keys() == images.keys()
    for name, (_, _, objects) in images.items():
        assert [o[0] for o in found[name]] == [o[0] for o in objects]
        boxes = [
            np.reshape([o[1:] for o in entries], (-1, 4)) for entries in (found[name], objects)
        ]
        np.testing.assert_allclose(*boxes, atol=1e-9)


@pytest.mark.parametrize("form", WRITERS)
def test_both_splits_know_the_same_classes_and_problems_are_reported_once(tmp_path, form):
    images = random_set(0)
    WRITERS[form](tmp_path, images)
    gone = next(tmp_path.rglob("*.jpg"))
    gone.unlink()
    found, _ = read_folder(tmp_path)
    contents, _ = splits_of(found)
    assert contents["train"]["categories"] == contents["val"]["categories"]
    assert {c["name"] for c in contents["train"]["categories"]} == set(CLASSES)
    _, _, problems = read(tmp_path, "skip")
    assert len(problems) == 1 or form == "COCO"  # there its annotations are named as well
    assert gone.stem in problems[0] or "annotations.xml, line" in problems[0]


def test_the_division_depends_on_names_alone(tmp_path):
    def content(names):
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        return {"images": images, "annotations": [], "categories": [], "problems": []}

    names = [f"{i}.jpg" for i in range(500)]

    def chosen(names):
        return {i["file_name"] for i in divided(content(names), 0.2)["val"]["images"]}

    val = chosen(names)
    assert 70 < len(val) < 130
    assert chosen(names[::-1]) == val
    assert chosen([*names, "another.jpg", "é.jpg"]) - {"another.jpg", "é.jpg"} == val
    assert chosen([unicodedata.normalize("NFD", "é.jpg"), *names]) & set(names) == val
    for few in range(2, 30):
        assert 1 <= len(chosen(names[:few])) < few
    with pytest.raises(InputError, match=r"--val-share is 1\.5"):
        splits_of(read_folder(simple_yolo(tmp_path))[0], share=1.5)


# ------------------------------------------------------------------------------ Pascal VOC


def simple_voc(root, names=("a", "b", "c"), **changes):
    images = {f"{n}.jpg": (48, 64, [("cat", 1.0, 2.0, 30.5, 40.0)]) for n in names}
    written.voc(root, images)
    for name, (old, new) in changes.items():
        file = root / "Annotations" / f"{name}.xml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
    return root


def image_sets(root, **lists):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in lists.items():
        (folder / f"{name}.txt").write_bytes(content)


def test_image_sets_are_the_splits(tmp_path):
    simple_voc(tmp_path)
    image_sets(
        tmp_path, train=b"\xef\xbb\xbfa\r\n\r\n", val=b"b.jpg\n", test=b"c", cat_train=b"a 1"
    )
    splits, said, _ = read(tmp_path)
    assert [*splits["train"], *splits["val"]] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert "train is its list 'train', val its list 'val'; not used: test" in said
    splits, _, _ = read(tmp_path, train="val", val="test")
    assert [*splits["train"], *splits["val"]] == ["JPEGImages/b.jpg", "JPEGImages/c.jpg"]
    assert "--train-list is valid; " in refused(tmp_path, train="valid")


def test_trainval_and_test_are_taken_where_there_is_no_train_and_val(tmp_path):
    simple_voc(tmp_path)
    image_sets(tmp_path, trainval=b"a\nb", test=b"c\n")
    splits, _, _ = read(tmp_path)
    assert (len(splits["train"]), len(splits["val"])) == (2, 1)


def test_lists_that_share_images_are_warned_of_and_absent_ones_named_with_their_line(tmp_path):
    simple_voc(tmp_path)
    image_sets(tmp_path, train=b"a\nb", val=b"b\n")
    _, said, _ = read(tmp_path)
    assert "WARNING: 1 images are in both, such as JPEGImages/b.jpg" in said
    assert "1 annotation files in none of the lists" in said
    image_sets(tmp_path, val=b"b\ngone\n")
    assert "ImageSets/Main/val.txt, line 2: there is no gone.xml" in refused(tmp_path)


def test_difficult_objects_are_kept_but_not_trained_on(tmp_path):
    simple_voc(tmp_path, a=("<difficult>0", "<difficult>1"))
    found, _ = read_folder(tmp_path)
    content = splits_of(found)[0]
    flags = [a["ignore"] for split in content.values() for a in split["annotations"]]
    assert sorted(flags) == [0, 0, 1]


def test_pixels_are_counted_from_1_only_where_the_file_is_of_the_voc_database(tmp_path):
    source = "<source><database>The VOC2007 Database</database></source><size>"
    simple_voc(tmp_path, a=("<size>", source))
    boxes = together(read(tmp_path)[0])
    assert boxes["a.jpg"] == [("cat", 0.0, 1.0, 30.5, 40.0)]
    assert boxes["b.jpg"] == [("cat", 1.0, 2.0, 30.5, 40.0)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<xmin>1.0<", "<xmin>one<", "Annotations/a.xml, line 3: xmin is 'one': it must be a num"),
        ("<xmin>1.0</xmin>", "", "Annotations/a.xml, line 3: xmin is missing"),
        ("<xmax>30.5<", "<xmax>1<", "Annotations/a.xml, line 3: the width and height of box [1.0"),
        ("<xmin>1.0<", "<xmin>nan<", "Annotations/a.xml, line 3: box [nan,"),
        ("<xmin>1.0</xmin>", "<xmin>64</xmin>", "Annotations/a.xml, line 3: "),
        ("<name>cat</name>", "<name> </name>", "a.xml, line 3: an <object> without <name>"),
        ("</annotation>", "", "Annotations/a.xml: line 7: not well-formed XML (no element found)"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]>\n<annotation>', "line 1: a document type"),
        ("annotation>", "annotations>", "outermost element is <annotations>, not <annotation>"),
    ],
)
def test_a_fault_in_xml_is_named_with_its_line(tmp_path, old, new, said):
    simple_voc(tmp_path, a=(old, new))
    assert said in refused(tmp_path)
    splits, _, problems = read(tmp_path, "skip")
    assert len(problems) == 1
    assert sum(map(len, together(splits).values())) == 2


def test_a_document_type_is_refused_before_its_entities_grow(tmp_path):
    entities = '<!ENTITY a0 "lol">' + "".join(
        f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)
    )
    simple_voc(tmp_path, a=("<annotation>", f"<!DOCTYPE a [{entities}]><annotation>"))
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("cat", "&a11;"))
    assert "a document type" in refused(tmp_path)


def test_sizes_that_are_not_stated_are_those_of_the_file(tmp_path):
    simple_voc(tmp_path, a=("<width>64", "<width>0"), b=("<size>", "<sizes>"), c=("64", "sixty"))
    file = tmp_path / "Annotations" / "b.xml"
    file.write_text(file.read_text().replace("</size>", "</sizes>"))
    found, _ = read_folder(tmp_path)
    for content in splits_of(found)[0].values():
        assert {(i["height"], i["width"]) for i in content["images"]} == {(48, 64)}


def test_the_image_of_an_xml_has_its_name_or_the_one_that_is_stated(tmp_path):
    simple_voc(tmp_path, a=("<filename>a.jpg", "<filename>C:\\photos\\other.png"))
    assert "a.jpg" in together(read(tmp_path)[0])
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "other.png")
    assert "other.png" in together(read(tmp_path)[0])
    (tmp_path / "JPEGImages" / "other.png").unlink()
    assert "Annotations/a.xml: no image a.jpg, .png, ... and none called" in refused(tmp_path)


def test_xml_beside_images_in_folders_of_splits(tmp_path):
    for split, names in (("train", "ab"), ("valid", "a")):  # the same name in both
        simple_voc(tmp_path / "made", names)
        for folder in ("JPEGImages", "Annotations"):
            for file in (tmp_path / "made" / folder).iterdir():
                (tmp_path / split).mkdir(exist_ok=True)
                file.rename(tmp_path / split / file.name)
        shutil.rmtree(tmp_path / "made")
    splits, said, _ = read(tmp_path)
    assert [*splits["train"], *splits["val"]] == ["train/a.jpg", "train/b.jpg", "valid/a.jpg"]
    assert "val its list 'valid'" in said


# ------------------------------------------------------------------------------ YOLO


LINE = "0 0.5 0.5 0.25 0.5\n"


def simple_yolo(root, labels=None, yaml="train: images\nnames: [cat, dog]\n", **sizes):
    """Images a and b, and files of labels; 64 x 48 pixels."""
    labels = {"a": LINE, "b": LINE} | (labels or {})
    for name, text in labels.items():
        photo(root / "images" / f"{name}.jpg", **sizes)
        (root / "labels").mkdir(exist_ok=True)
        data = text.encode() if isinstance(text, str) else text
        (root / "labels" / f"{name}.txt").write_bytes(data)
    (root / "data.yaml").write_text(yaml, "utf-8")
    return root


BOX = ("cat", 24.0, 12.0, 40.0, 36.0)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("", []),
        ("\n  \n", []),
        (LINE.replace("\n", "\r\n") + "\r\n", [BOX]),
        (b"\xef\xbb\xbf" + LINE.encode(), [BOX]),
        (LINE.encode("utf-16"), [BOX]),
        (LINE.strip(), [BOX]),
        ("  1\t0.5 0.5  0.25 0.5 ", [("dog", *BOX[1:])]),
        ("0.0 5e-1 .5 0.25 0.5", [BOX]),
        ("0 0.25 0.5 0.5 0.25 0.75 0.5", [("cat", 16.0, 12.0, 48.0, 24.0)]),
        ("0 0 0 0.5 0 0.5 0.5 0 0.5", [("cat", 0.0, 0.0, 32.0, 24.0)]),  # four corners
        ("0 0 0.5 0.5 0.5", [("cat", -16.0, 12.0, 16.0, 36.0)]),  # reaches outside
    ],
)
def test_lines_of_labels(tmp_path, text, objects):
    splits, _, problems = read(simple_yolo(tmp_path, {"odd": text}))
    assert problems == []
    found = together(splits)["odd.jpg"]
    assert [o[0] for o in found] == [o[0] for o in objects]
    np.testing.assert_allclose(*[[o[1:] for o in x] for x in (found, objects)], atol=1e-9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2 has no name; those with names are 0, 1"),
        ("-1 0.5 0.5 0.1 0.1", "a line begins with the number of the class: '-1 0.5"),
        ("cat 0.5 0.5 0.1 0.1", "'cat' is no number such as 0.5"),
        ("1.5 0.5 0.5 0.1 0.1", "a line begins with the number of the class"),
        ("nan 0.5 0.5 0.1 0.1", "a line begins with the number of the class"),
        ("0 0.5 0.5 0.1", "3 numbers after the class: a box has 4, a polygon 2 for each"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers after the class"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.1 0.1", "7 numbers after the class"),
        ("0 32 24 16 24", "numbers above 1: shares of the image's width and height are needed"),
        ("0 0.5 nan 0.1 0.1", "numbers must be finite"),
        ("0 0.5 0.5 0 0.1", "the width and height of box"),
        ("0 0.5 0.5 -0.1 0.1", "the width and height of box"),
        ("0 1.5 0.5 0.1 0.1", "lies outside the image, 64 x 48"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, line, said):
    simple_yolo(tmp_path, {"odd": LINE + "\n" + line + "\n" + LINE})
    message = refused(tmp_path)
    assert "labels/odd.txt, line 3: " in message
    assert said in message
    splits, _, problems = read(tmp_path, "skip")
    assert len(problems) == 1
    np.testing.assert_allclose([o[1:] for o in together(splits)["odd.jpg"]], [BOX[1:]] * 2)


def test_shares_are_of_the_photo_as_it_is_seen(tmp_path):
    simple_yolo(tmp_path, {"turned": "0 0.25 0.5 0.5 0.25"})
    photo(tmp_path / "images" / "turned.jpg", height=48, width=64, orientation=6)
    found = together(read(tmp_path)[0])["turned.jpg"]
    np.testing.assert_allclose(found[0][1:], [0, 24, 24, 40])  # of 48 x 64


def test_an_image_without_labels_shows_nothing_and_labels_without_an_image_are_a_problem(tmp_path):
    simple_yolo(tmp_path)
    photo(tmp_path / "images" / "nothing.jpg")
    splits, said, _ = read(tmp_path)
    assert together(splits)["nothing.jpg"] == []
    assert "1 images without a label file: taken to show no objects" in said
    (tmp_path / "labels" / "gone.txt").write_text(LINE)
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    assert "labels/gone.txt: labels of an image that is not there" in refused(tmp_path)


def test_a_broken_image_is_named(tmp_path):
    simple_yolo(tmp_path)
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    assert "images/a.jpg: truncated or not an image" in refused(tmp_path)


def test_labels_somewhere_else_are_not_taken_for_empty_ones(tmp_path):
    simple_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    message = refused(tmp_path)
    assert "none of its 2 images has a label file; that of images/a.jpg would be " in message
    assert "labels/a.txt" in message


@pytest.mark.parametrize(
    "train",
    [
        "images",
        "./images/",
        "../images",  # beside data.yaml, as some exporters write it
        "images\\",
        "list.txt",
        "[images]",
        "\n- list.txt\n- images",
    ],
)
@pytest.mark.parametrize("path", ["", "path: .\n", "path: /content/datasets/gone\n"])
def test_train_may_be_a_folder_a_list_or_several(tmp_path, train, path):
    yaml = f"{path}train: {train}\nval: other/images\nnames: [cat, dog]\n"
    simple_yolo(tmp_path, yaml=yaml)
    (tmp_path / "list.txt").write_text("./images/a.jpg\r\n/home/me/data/images/b.jpg\n\n")
    simple_yolo(tmp_path / "made", {"c": LINE})
    (tmp_path / "made" / "data.yaml").unlink()
    (tmp_path / "made").rename(tmp_path / "other")
    splits, _, _ = read(tmp_path)
    assert sorted(splits["train"]) == ["images/a.jpg", "images/b.jpg"]
    assert sorted(splits["val"]) == [f"other/images/{n}.jpg" for n in "abc"]


def test_a_list_names_its_line(tmp_path):
    simple_yolo(tmp_path, yaml="train: list.txt\nnames: [cat]\n")
    (tmp_path / "list.txt").write_text("images/a.jpg\nimages/gone.jpg\n")
    assert "list.txt, line 2: there is no image images/gone.jpg" in refused(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train: images\nnames: cat\n", "`names` must be a list of the classes"),
        ("train: images\nnames: {a: cat}\n", "`names` must be a list"),
        ("train: images\nnames: [[cat], dog]\n", "`names` must be a list"),
        ("train: images\nnc: 3\nnames: [cat, dog]\n", "`nc` is 3, but `names` has 2 classes"),
        ("train: [images\nnames: [cat]\n", "is not valid YAML: .*line 2"),
        ("train: gone\nnames: [cat]\n", "`train` is gone, but there is no .*gone"),
        ("train: {a: b}\nnames: [cat]\n", "`train` must be a folder, a text file, or a list"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(tmp_path, yaml, said):
    simple_yolo(tmp_path, yaml=yaml)
    with pytest.raises(InputError, match=said) as error:
        read(tmp_path)
    assert "data.yaml" in str(error.value)


def test_aliases_in_yaml_cannot_grow(tmp_path):
    rows = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    simple_yolo(tmp_path, yaml=f"a0: &a0 [x]\n{rows}train: images\nnames: [*a11]\n")
    assert "`names` must be a list" in refused(tmp_path)


def test_keypoints_follow_the_box(tmp_path):
    simple_yolo(tmp_path, {"a": LINE.strip() + " 0.1 0.1 2 0.9 0.9 2\n"})
    yaml = tmp_path / "data.yaml"
    yaml.write_text(yaml.read_text() + "kpt_shape: [2, 3]\n")
    assert together(read(tmp_path)[0])["a.jpg"] == [BOX]


def test_classes_txt_and_labels_beside_the_images(tmp_path):
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(LINE)
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n")
    splits, said, _ = read(tmp_path)
    assert together(splits) == {"a.jpg": [BOX], "b.jpg": [BOX]}
    assert "because of classes.txt" in said


def test_yolo_of_label_studio_and_of_cvat(tmp_path):
    simple_yolo(tmp_path / "studio")
    (tmp_path / "studio" / "data.yaml").unlink()
    (tmp_path / "studio" / "classes.txt").write_text("cat\n")
    (tmp_path / "studio" / "notes.json").write_text('{"categories": [], "info": {}}')
    assert together(read(tmp_path / "studio")[0]) == {"a.jpg": [BOX], "b.jpg": [BOX]}

    data = tmp_path / "cvat" / "obj_train_data"
    for name in "ab":
        photo(data / f"{name}.jpg")
        (data / f"{name}.txt").write_text(LINE)
    (tmp_path / "cvat" / "obj.names").write_text("cat\n")
    (tmp_path / "cvat" / "obj.data").write_text("classes = 1\nnames = data/obj.names\n")
    (tmp_path / "cvat" / "train.txt").write_text(
        "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg"
    )
    assert together(read(tmp_path / "cvat")[0]) == {"a.jpg": [BOX], "b.jpg": [BOX]}


def test_images_of_whose_labels_none_can_be_used_are_counted(tmp_path):
    simple_yolo(tmp_path, {"odd": "7 0.5 0.5 0.1 0.1", "even": LINE})
    said = read(tmp_path, "skip")[1]
    assert "1 images of whose labels none can be used: left without objects" in said


def test_a_yaml_without_names_is_not_called_missing(tmp_path):
    simple_yolo(tmp_path, {"odd": LINE})
    (tmp_path / "data.yaml").write_text("train: images\nnc: 2\n")
    with pytest.raises(InputError, match=r"data\.yaml has no `names:`"):
        read(tmp_path)


# ------------------------------------------------------------------------------ CVAT


def simple_cvat(root, shapes="", images="ab", subset=""):
    photos(root / "images", {f"{n}.jpg": (48, 64, []) for n in images})
    box = '<box label="cat" xtl="1" ytl="2" xbr="30.5" ybr="40"/>'
    text = "".join(
        f'\n<image name="{n}.jpg" width="64" height="48" {subset and f"subset={subset[i]!r}"}>'
        f"{box if i else shapes or box}</image>"
        for i, n in enumerate(images)
    )
    labels = "<meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    (root / "annotations.xml").write_text(f"<annotations>{labels}{text}\n</annotations>")
    return root


def test_shapes_with_an_extent_become_boxes(tmp_path):
    shapes = (
        '<box label="cat" xtl="10" ytl="10" xbr="30" ybr="20" rotation="30"/>'
        '<polygon label="cat" points="10.5,10;30,12;20,40"/>'
        '<ellipse label="cat" cx="20" cy="21" rx="10" ry="5"/>'
        '<mask label="cat" rle="1, 2" left="3" top="4" width="5" height="6"/><tag label="good"/>'
    )
    splits, said, _ = read(simple_cvat(tmp_path, shapes))
    found = together(splits)["a.jpg"]
    assert [o[0] for o in found] == ["cat"] * 4
    expected = [
        written.rotated(10, 10, 20, 10, 30, (20, 15)),
        [10.5, 10, 30, 40],
        [10, 16, 30, 26],
        [3, 4, 8, 10],
    ]
    np.testing.assert_allclose([o[1:] for o in found], expected)
    assert "4 shapes other than upright boxes: the box around each is taken" in said


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ('<points label="cat" points="1,2"/>', "<points> of 'cat' has no box; remove it, or draw"),
        ('<box label="cat" xtl="1" ytl="2" xbr="3"/>', "ybr is missing: it must be a number"),
        ('<box label="cat" xtl="1" ytl="2" xbr="3" ybr="4,5"/>', "ybr is '4,5'"),
        ('<box xtl="1" ytl="2" xbr="3" ybr="4"/>', "<box> without label"),
        ('<box label="dog" xtl="1" ytl="2" xbr="3" ybr="4"/>', "label 'dog'; the task has cat"),
        ('<polygon label="cat" points=""/>', "points is ''"),
        ('<box label="cat" xtl="3" ytl="2" xbr="1" ybr="4"/>', "the width and height of box"),
    ],
)
def test_a_shape_without_a_box_is_named_with_its_line(tmp_path, shape, said):
    simple_cvat(tmp_path, shape)
    message = refused(tmp_path)
    assert "annotations.xml, line 2: " in message
    assert said in message
    assert len(read(tmp_path, "skip")[2]) == 1


def test_subsets_of_a_project_are_lists(tmp_path):
    simple_cvat(tmp_path, images="abc", subset=["Train", "Validation", "Train"])
    splits, _, _ = read(tmp_path)
    assert [*splits["train"], *splits["val"]] == ["images/a.jpg", "images/c.jpg", "images/b.jpg"]


def test_videos_and_missing_images_of_cvat(tmp_path):
    simple_cvat(tmp_path)
    (tmp_path / "images" / "b.jpg").unlink()
    assert "annotations.xml, line 3: there is no image 'b.jpg' below" in refused(tmp_path)
    file = tmp_path / "annotations.xml"
    file.write_text('<annotations>\n<track id="0" label="cat"></track></annotations>')
    assert "line 2: this is 'CVAT for video'; export the task again as" in refused(tmp_path)


# ------------------------------------------------------------------------------ Label Studio


def simple_studio(root, *tasks):
    for name in "ab":
        photo(root / "photos" / f"{name}.jpg")
    plain = task(name="b", regions=[region("cat", 1, 2, 30.5, 40, 48, 64)])
    (root / "export.json").write_text(json.dumps([*tasks, plain]))
    return root


def task(regions, name="a", url="/data/upload/3/0a1b2c3d-{}.jpg", **more):
    done = {"result": regions, "was_cancelled": False, "updated_at": "2024-01-02"} | more
    return {"id": 7, "annotations": [done], "data": {"image": url.format(name)}}


@pytest.mark.parametrize(
    "url",
    [
        "/data/upload/3/0a1b2c3d-{}.jpg",
        "/data/local-files/?d=some/where/{}.jpg",
        "s3://bucket/photos/{}.jpg",
        "https://example.org/photos/{}.jpg?signature=1%2F2",
        "C:\\Users\\me\\{}.jpg",
        "{}.jpg",
    ],
)
def test_an_image_is_found_by_any_address(tmp_path, url):
    studio = simple_studio(tmp_path, task([], url=url))
    assert together(read(studio)[0]).keys() == {"a.jpg", "b.jpg"}


def test_the_newest_annotation_counts_and_predictions_do_not(tmp_path):
    old, new = (region(c, 1, 2, 30, 40, 48, 64) for c in ("cat", "dog"))
    both = task([new])
    both["annotations"].append({"result": [old], "updated_at": "2023-12-31"})
    both["annotations"].append({"result": [old], "updated_at": "2025-01-01", "was_cancelled": True})
    both["predictions"] = [{"result": [old, old]}]
    undone = task([]) | {"annotations": [], "predictions": [{"result": [old]}]}
    splits, said, _ = read(simple_studio(tmp_path, both, undone))
    assert together(splits)["a.jpg"] == [("dog", 1, 2, 30, 40)]
    assert "1 images with several annotations: the newest of each is taken" in said
    assert "1 tasks without an annotation: left out" in said
    (tmp_path / "export.json").write_text(json.dumps([undone]))
    assert "none of its 1 tasks has an annotation" in refused(tmp_path)


def test_regions_of_every_type(tmp_path):
    turned = region("cat", 10, 10, 30, 20, 48, 64)
    turned["value"]["rotation"] = 30
    size = {"original_width": 200, "original_height": 100}
    polygon = {"points": [[10, 10], [30, 15], [20, 40]], "polygonlabels": ["cat", "dog"]}
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "ellipselabels": ["dog"]}
    choice = {"choices": ["good"]}
    regions = [turned, *({"value": v} | size for v in (polygon, ellipse, choice))]
    for entry in regions:
        entry |= {"original_width": 64, "original_height": 48}
    splits, said, _ = read(simple_studio(tmp_path, task(regions)))
    found = together(splits)["a.jpg"]
    assert [o[0] for o in found] == ["cat", "cat", "dog", "dog"]
    expected = [
        written.rotated(10, 10, 20, 10, 30, (10, 10)),
        *[[6.4, 4.8, 19.2, 19.2]] * 2,
        [25.6, 14.4, 38.4, 33.6],
    ]
    np.testing.assert_allclose([o[1:] for o in found], expected)
    assert "3 shapes other than upright boxes" in said


@pytest.mark.parametrize(
    ("changes", "value", "said"),
    [
        ({"image_rotation": 90}, {}, "the image was turned by 90 degrees"),
        ({}, {"rectanglelabels": []}, None),
        ({}, {"x": "wide"}, "cannot be read"),
        ({}, {"width": 0}, "the width and height of box"),
        ({"type": "brushlabels"}, None, "a region of type 'brushlabels' has no box"),
        ({"type": "rectangle"}, "no labels", "a region of type 'rectangle' without a label"),
    ],
)
def test_a_region_that_cannot_be_used_is_named(tmp_path, changes, value, said):
    entry = region("cat", 1, 2, 30, 40, 48, 64) | changes
    if value is None:
        entry["value"] = {"format": "rle", "rle": [1, 2], "brushlabels": ["cat"]}
    elif value == "no labels":
        del entry["value"]["rectanglelabels"]
    else:
        entry["value"] |= value
    simple_studio(tmp_path, task([entry]))
    if said is None:
        assert together(read(tmp_path)[0])["a.jpg"] == []
        return
    message = refused(tmp_path)
    assert "export.json, task 7, region 1: " in message
    assert said in message


def test_an_export_without_its_images_says_so(tmp_path):
    shutil.rmtree(simple_studio(tmp_path) / "photos")
    assert "there is no image 0a1b2c3d-b.jpg or b.jpg below" in refused(tmp_path)


# ------------------------------------------------------------------------------ the folder


def test_coco_jsons_in_folders_of_splits(tmp_path):
    for split in ("train", "valid"):
        written.coco(tmp_path / "made", {"a.jpg": (48, 64, [("no", 1.0, 2.0, 30.5, 40.0)])})
        (tmp_path / split).mkdir()
        (tmp_path / "made" / "images" / "a.jpg").rename(tmp_path / split / "a.jpg")
        file = tmp_path / split / "_annotations.coco.json"
        text = (tmp_path / "made" / "result.json").read_text()
        file.write_text(text.replace("images\\\\", ""))
        shutil.rmtree(tmp_path / "made")
    splits, _, _ = read(tmp_path)
    assert splits == {
        "train": {"train/a.jpg": [("no", 1.0, 2.0, 30.5, 40.0)]},
        "val": {"valid/a.jpg": [("no", 1.0, 2.0, 30.5, 40.0)]},
    }
    shutil.copy(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train.json")
    assert "several jsons: train.json, train/_annotations.coco.json" in refused(tmp_path)


def test_a_folder_of_two_forms_asks_which(tmp_path):
    simple_yolo(tmp_path)
    simple_voc(tmp_path)
    message = refused(tmp_path)
    assert "choose --form voc (Annotations/a.xml); --form yolo (data.yaml)" in message
    assert together(read(tmp_path, form="yolo")[0])["a.jpg"] == [BOX]


def test_a_folder_of_no_form_says_what_was_looked_for(tmp_path):
    assert "has none of: a COCO json; Annotations/*.xml (Pascal VOC)" in refused(tmp_path)
    (tmp_path / "export.zip").write_bytes(b"PK")
    assert refused(tmp_path).endswith("Unpack export.zip first")
    (tmp_path / "export.json").write_text('[{"id": 1,')
    assert "export.json is no valid json: " in refused(tmp_path)
    with pytest.raises(MissingFileError, match="there is no folder"):
        read(tmp_path / "gone")


def test_images_may_lie_elsewhere(tmp_path):
    simple_cvat(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    assert together(read(tmp_path, images="photos")[0]).keys() == {"a.jpg", "b.jpg"}
    with pytest.raises(MissingFileError, match="--images is relative to SRC"):
        read(tmp_path, images="gone")


def test_a_name_that_two_images_have_is_not_guessed(tmp_path):
    simple_cvat(tmp_path)
    (tmp_path / "images").rename(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert "there is no image 'a.jpg' below" in refused(tmp_path)


def test_accents_may_be_written_in_two_ways(tmp_path):
    name = unicodedata.normalize("NFD", "é.jpg")
    simple_cvat(tmp_path, images="éa")
    (tmp_path / "images" / "é.jpg").rename(tmp_path / "images" / name)
    splits, _, _ = read(tmp_path)
    assert together(splits).keys() == {name, "a.jpg"}


def test_problems_name_the_place_in_place_of_ids(tmp_path):
    simple_yolo(tmp_path, {"odd": "0 0.5 0.5 0 0"})
    with pytest.raises(DataError) as error:
        read(tmp_path)
    (problem,) = error.value.problems
    assert (problem.file, problem.image_id) == ("labels/odd.txt, line 1", None)


def test_one_image_cannot_be_divided(tmp_path):
    assert "annotations.xml has one image that can be used" in refused(
        simple_cvat(tmp_path, images="a")
    )


WRONG = [
    None,
    0,
    -1,
    True,
    1e308,
    float("nan"),
    10**400,
    "",
    "\ud800",
    "a\0.jpg",
    "x" * 300,
    [],
    {},
]
WRONG += [[[]], [None], {"a": 1}, ["cat"], "http://[a.jpg", 2.5]
TOKENS = [
    "",
    "0",
    "nan",
    "1e999",
    "<",
    "</",
    "&#0;",
    "9" * 400,
    "\x00",
    "..",
    "[]",
    "{",
    "- ",
    "\r\n",
]


def damaged(text, is_json, rng):
    """A file's text with a few things in it changed, as JSON or letter by letter."""
    if is_json and rng.random() < 0.9:
        tree = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            places, waiting = [], [tree]
            while waiting:
                node = waiting.pop()
                keys = range(len(node)) if isinstance(node, list) else [*node]
                places += [(node, key) for key in keys]
                waiting += [node[key] for key in keys if isinstance(node[key], list | dict)]
            if places:
                node, key = rng.choice(places)
                node[key] = rng.choice(WRONG)
        return json.dumps(tree)
    for _ in range(rng.randint(1, 3)):
        words = list(re.finditer(r"[\w.\-]+|[^\w\s]", text))
        start, end = rng.choice(words).span() if words else (0, 0)
        text = text[:start] + rng.choice(TOKENS) + text[rng.choice([end, end, end, start + 99]) :]
    return text


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_what_is_damaged_is_read_or_refused_in_words(tmp_path, form, count):
    WRITERS[form](tmp_path, random_set(1))
    rng = random.Random(count)
    files = [f for f in tmp_path.rglob("*") if f.suffix in (".xml", ".json", ".txt", ".yaml")]
    whole = {file: file.read_text("utf-8") for file in sorted(files)}
    for _ in range(count):
        file = rng.choice(list(whole))
        file.write_text(damaged(whole[file], file.suffix == ".json", rng), "utf-8", "replace")
        for on_error in ("raise", "skip"):
            try:
                read(tmp_path, on_error)
            except UserError as error:
                assert len(str(error)) > 20
        file.write_text(whole[file], "utf-8")

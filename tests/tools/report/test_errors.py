"""Each kind of error, on images made for it."""

import numpy as np
import pytest

from gfl_jax.tools.report.errors import KINDS, Objects, judge

CAT, DOG = 0, 1
NONE = np.zeros((0, 4))


def objects(*boxes_labels, crowd=()):
    boxes = [box for box, _ in boxes_labels]
    labels = [label for _, label in boxes_labels]
    crowds = [i in crowd for i in range(len(labels))]
    return Objects(np.reshape(boxes, (-1, 4)), np.array(labels, int), np.array(crowds, bool))


def judged(truth, *detections):
    boxes = np.reshape([box for box, _ in detections], (-1, 4))
    found = judge(truth, boxes, np.array([label for _, label in detections], int))
    return [KINDS[kind] for kind in found.kind], found


# A box moved by x of its width w has the IoU (w - x) / (w + x).
HERE, SHIFTED, FAR, AWAY = (
    (0, 0, 100, 100),
    (20, 0, 120, 100),  # 0.667
    (60, 0, 160, 100),  # 0.25
    (90, 0, 190, 100),  # 0.053
)


def test_a_detection_that_overlaps_enough_is_correct():
    kinds, found = judged(objects((HERE, CAT)), (SHIFTED, CAT))
    assert kinds == ["correct"]
    assert found.truth.tolist() == [0] and found.found.tolist() == [0]
    np.testing.assert_allclose(found.iou, 80 / 120)
    assert not found.missed.any()


def test_an_error_of_class_is_at_the_right_place_with_the_wrong_name():
    kinds, found = judged(objects((HERE, CAT)), (SHIFTED, DOG))
    assert kinds == ["class"]
    np.testing.assert_allclose(found.iou, 80 / 120)
    assert found.iou_of_class.tolist() == [0]
    assert found.found.tolist() == [-1]
    assert not found.missed.any(), "covered by the error of class"


def test_an_error_of_localization_has_the_right_name_and_overlaps_too_little():
    kinds, found = judged(objects((HERE, CAT)), (FAR, CAT))
    assert kinds == ["localization"]
    np.testing.assert_allclose([found.iou, found.iou_of_class], 0.25)
    assert not found.missed.any(), "covered by the error of localization"


def test_both_is_the_wrong_name_and_too_little_overlap():
    kinds, found = judged(objects((HERE, CAT)), (FAR, DOG))
    assert kinds == ["both"]
    assert found.missed.tolist() == [True]


def test_a_duplicate_is_on_an_object_that_a_better_detection_has_found():
    kinds, found = judged(objects((HERE, CAT)), (SHIFTED, CAT), (HERE, CAT))
    assert kinds == ["correct", "duplicate"], "the higher score comes first"
    assert found.found.tolist() == [0]
    assert found.truth.tolist() == [0, 0]


def test_background_is_on_no_object():
    kinds, found = judged(objects((HERE, CAT)), (AWAY, CAT), ((500, 500, 600, 600), DOG))
    assert kinds == ["background", "background"]
    assert found.truth.tolist() == [0, -1]
    assert found.missed.tolist() == [True]


def test_an_object_is_missed_without_any_detection():
    kinds, found = judged(objects((HERE, CAT), (FAR, DOG)))
    assert kinds == []
    assert found.missed.tolist() == [True, True]


def test_an_image_without_objects_has_background_alone():
    kinds, found = judged(objects(), (HERE, CAT))
    assert kinds == ["background"]
    assert found.truth.tolist() == [-1]
    assert found.missed.shape == (0,)


def test_what_is_on_a_crowd_of_its_class_is_ignored():
    wide = (0, 0, 1000, 1000)
    truth = objects((wide, CAT), crowd=(0,))
    kinds, found = judged(truth, (HERE, CAT), (HERE, DOG))
    assert kinds == ["ignored", "background"]
    assert not found.missed.any()


def test_an_object_beside_a_crowd_is_found_first():
    truth = objects(((0, 0, 1000, 1000), CAT), (HERE, CAT), crowd=(0,))
    assert judged(truth, (SHIFTED, CAT), (HERE, CAT))[0] == ["correct", "ignored"]


def test_a_detection_takes_the_closest_object_that_is_free():
    truth = objects((HERE, CAT), ((10, 0, 110, 100), CAT))
    kinds, found = judged(truth, (HERE, CAT), ((2, 0, 102, 100), CAT))
    assert kinds == ["correct", "correct"]
    assert found.truth.tolist() == [0, 1]


@pytest.mark.parametrize("label, kind", [(CAT, "localization"), (DOG, "class")])
def test_an_object_that_was_found_may_be_the_one_of_an_error(label, kind):
    box = FAR if label == CAT else SHIFTED
    kinds, found = judged(objects((HERE, CAT)), (HERE, CAT), (box, label))
    assert kinds == ["correct", kind]
    assert found.truth.tolist() == [0, 0]

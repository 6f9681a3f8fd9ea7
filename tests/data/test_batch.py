import numpy as np

from gfl_jax.data.batch import Sample, pad


def sample(height, width, count, scale=(1.0, 1.0)):
    rng = np.random.default_rng(height)
    image = rng.integers(1, 256, (height, width, 3), np.uint8)
    return Sample(image, scale, rng.uniform(0, 9, (count, 4)), np.arange(count))


def test_images_lie_in_the_upper_left_corner_of_the_smallest_canvas():
    samples = [sample(33, 20, 2), sample(10, 64, 0, (0.5, 0.25))]
    batch = pad(samples)
    assert batch.images.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(batch.images[0, :33, :20], samples[0].image)
    assert batch.images.sum() == sum(s.image.sum() for s in samples)
    np.testing.assert_array_equal(batch.sizes, [[33, 20], [10, 64]])
    np.testing.assert_array_equal(batch.scales, [[1, 1], [0.5, 0.25]])
    assert batch.image_mask.all()


def test_objects_are_padded_and_masked():
    samples = [sample(8, 8, 2), sample(9, 9, 3), sample(7, 7, 0)]
    batch = pad(samples)
    np.testing.assert_array_equal(batch.box_mask, [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(batch.boxes[1], samples[1].boxes.astype(np.float32))
    np.testing.assert_array_equal(batch.labels[0], [0, 1, 0])
    assert (batch.boxes[~batch.box_mask] == 0).all()
    assert pad(samples[2:]).boxes.shape == (1, 1, 4)
    assert pad(samples, max_boxes=8).boxes.shape == (3, 8, 4)


def test_a_slot_that_fills_the_batch_has_an_image_but_no_objects():
    batch = pad([sample(8, 8, 2)] * 2, (32, 64), 2, np.array([True, False]))
    assert batch.images.shape == (2, 32, 64, 3)
    np.testing.assert_array_equal(batch.image_mask, [True, False])
    np.testing.assert_array_equal(batch.box_mask, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(batch.images[0], batch.images[1])

"""The house stays a tower: limits of what has to be read, and no import that runs upwards."""

import house


def test_files_stay_short_enough_to_read():
    assert house.too_long() == {}


def test_nothing_is_imported_by_what_stands_below_it():
    assert list(house.upward()) == []


def test_no_modules_import_each_other():
    assert house.cycles() == []


def test_every_reason_for_not_opening_a_file_is_about_an_existing_one():
    assert set(house.NOT_OPENED) <= set(house.modules())


def test_an_import_is_found_in_each_of_its_forms(tmp_path, monkeypatch):
    text = {
        "train": "import gfl_jax.losses\nfrom gfl_jax import boxes, priors as p",
        "gfl_jax": "",
        "gfl_jax.boxes": "def f():\n    from gfl_jax.priors import Points",
        "gfl_jax.priors": "from gfl_jax.boxes import area",
        "gfl_jax.losses": "from gfl_jax.config import Experiment",
        "gfl_jax.config": "",
    }
    for name, lines in text.items():
        (tmp_path / f"{name}.py").write_text(lines)
    monkeypatch.setattr(house, "modules", lambda: {n: tmp_path / f"{n}.py" for n in text})
    house.imports_of.cache_clear()
    try:
        assert house.imports_of("train") == {"gfl_jax.losses", "gfl_jax.boxes", "gfl_jax.priors"}
        assert house.cycles() == [["gfl_jax.boxes", "gfl_jax.priors"]]
        assert [arrow.split(" ")[0] for arrow in house.upward()] == ["gfl_jax.losses"]
    finally:
        house.imports_of.cache_clear()


def test_test_files_have_names_of_their_own():
    """Pytest imports them by these alone: of two with one name it would run one."""
    names = [file.name for file in (house.ROOT / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)

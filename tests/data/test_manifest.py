"""Reading tables of labelled audio, class lists, and the holdout split."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastat.data.shards import ClassInfo
from fastat.packing.classes import ClassList
from fastat.packing.manifest import Manifest, read_manifest
from fastat.packing.split import holdout_mask
from fastat.system.errors import UserError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def labels_of(manifest: Manifest) -> dict[str, list[str]]:
    ids = [c.id for c in manifest.classes.classes]
    return {entry.name: [ids[k] for k in entry.labels] for entry in manifest.good}


AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=7, num_segs=7, num_unique_labels=3, num_positive_labels=9
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0aBcDeFgHi, 0.000, 10.000, "/m/09x0r"
_1aBcDeFgHi, 50.000, 60.000, "/m/012xff"
2aBcDeFgHi_, 2.500, 12.500, "/m/012xff"
3aBcDeFgHij, 30.000, 40.000, "/m/012xff"
4aBcDeFgHij, 30.000, 40.000, "/m/012xff"
5aBcDeFgHij, 30.000, 40.000, "/m/09x0r"
"""


def test_audioset_names(tmp_path: Path) -> None:
    audio = touch(
        tmp_path / "clips",
        "--PJHxphWEs.wav",
        "--PJHxphWEs.json",
        "Y-0aBcDeFgHi.flac",
        "_1aBcDeFgHi_50.mp3",
        "part2/Y2aBcDeFgHi__2500.m4a",
        "3aBcDeFgHij_30000.wav",
        "3aBcDeFgHij_90000.wav",
        "4aBcDeFgHij.wav",
        "Y4aBcDeFgHij_30.000_40.000.wav",
    )
    table = write(tmp_path / "segments.csv", AUDIOSET)
    manifest = read_manifest(table, audio=audio)
    assert labels_of(manifest) == {
        "--PJHxphWEs.wav": ["/m/09x0r", "/t/dd00088"],
        "Y-0aBcDeFgHi.flac": ["/m/09x0r"],
        "_1aBcDeFgHi_50.mp3": ["/m/012xff"],
        "part2/Y2aBcDeFgHi__2500.m4a": ["/m/012xff"],
        "3aBcDeFgHij_30000.wav": ["/m/012xff"],
        "Y4aBcDeFgHij_30.000_40.000.wav": ["/m/012xff"],
    }
    assert [c.id for c in manifest.classes.classes] == ["/m/012xff", "/m/09x0r", "/t/dd00088"]
    assert [(b.reason, b.line) for b in manifest.bad] == [("missing", 10)]
    assert "5aBcDeFgHij" in manifest.bad[0].path
    assert manifest.good[0].line == 4
    assert Path(manifest.good[3].path) == audio.resolve() / "part2/Y2aBcDeFgHi__2500.m4a"


@pytest.mark.parametrize(
    "header",
    [
        "YTID,start_seconds,end_seconds,positive_labels",
        "ytid,Start_Seconds,END_SECONDS,positive_labels",
    ],
)
def test_audioset_as_pandas_saves_it(tmp_path: Path, header: str) -> None:
    touch(tmp_path / "audio", "v_30000.wav", "w.wav")
    table = write(tmp_path / "t.csv", f'{header}\nv,30.0,40.0,"/m/1,/m/2"\nw,0.0,10.0,/m/1\n')
    manifest = read_manifest(table)
    assert labels_of(manifest) == {"v_30000.wav": ["/m/1", "/m/2"], "w.wav": ["/m/1"]}
    assert [entry.line for entry in manifest.good] == [2, 3]


def test_audioset_default_folder_and_class_list(tmp_path: Path) -> None:
    table = write(tmp_path / "segments.csv", AUDIOSET)
    with pytest.raises(UserError, match="--audio DIR"):
        read_manifest(table)
    touch(tmp_path / "audio", "--PJHxphWEs.wav", "_1aBcDeFgHi.wav")
    classes = write(
        tmp_path / "classes.csv",
        'index,mid,display_name\n1,/t/dd00088,Gush\n0,/m/09x0r,"Speech, human"\n',
    )
    manifest = read_manifest(table, labels=classes)
    assert manifest.classes.classes == (
        ClassInfo("/m/09x0r", "Speech, human"),
        ClassInfo("/t/dd00088", "Gush"),
    )
    assert [entry.labels for entry in manifest.good] == [(0, 1)]
    reasons = [bad.reason for bad in manifest.bad]
    assert reasons.count("label unknown") == 4 and reasons.count("missing") == 2
    assert {b.detail for b in manifest.bad if b.reason == "label unknown"} == {"/m/012xff"}


def test_csv_columns(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "audio/b.wav", "sub/c.wav")
    absolute = touch(tmp_path / "far", "d.wav") / "d.wav"
    table = write(
        tmp_path / "t.csv",
        "\ufeffid,path,labels\n"
        '1,a.wav,"dog;cat"\n'
        "2,b.wav,cat; bird\n"
        "\n"
        f"3,{absolute},dog\n"
        "4,sub/c.wav,dog;dog\n"
        "5,none.wav,dog\n"
        "6,sub/e.wav,\n",
    )
    manifest = read_manifest(table)
    assert labels_of(manifest) == {
        "a.wav": ["cat", "dog"],
        "b.wav": ["bird", "cat"],
        str(absolute): ["dog"],
        "sub/c.wav": ["dog"],
    }
    assert Path(manifest.good[1].path) == tmp_path / "audio/b.wav"
    assert [(b.reason, b.line) for b in manifest.bad] == [("missing", 7), ("label unknown", 8)]
    inside = read_manifest(table, audio=tmp_path / "audio")
    assert [entry.name for entry in inside.good] == ["b.wav", str(absolute)]


@pytest.mark.parametrize("header", ["filename,category", "path,label", "label,filename"])
def test_csv_headers_and_tabs(tmp_path: Path, header: str) -> None:
    touch(tmp_path, "a.wav")
    row = "x,a.wav" if header.startswith("label,") else "a.wav,x"
    for delimiter in (",", "\t"):
        text = f"{header}\n{row}\n".replace(",", delimiter)
        assert labels_of(read_manifest(write(tmp_path / "t.csv", text))) == {"a.wav": ["x"]}


def test_label_with_a_comma_is_one_class_of_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    classes = write(tmp_path / "c.csv", 'index,mid,display_name\n0,m0,"Male, speaking"\n1,m1,Dog\n')
    table = write(tmp_path / "t.csv", 'path,labels\na.wav,"Male, speaking"\nb.wav,"m0,Dog"\n')
    manifest = read_manifest(table, labels=classes)
    assert labels_of(manifest) == {"a.wav": ["m0"], "b.wav": ["m0", "m1"]}


def test_folder_of_classes(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "set", "dog/1.wav", "dog/more/2.flac", "cat, wild/3.wav",
        "dog/notes.txt", "README.md", ".hidden/4.wav",
    )  # fmt: skip
    manifest = read_manifest(root)
    assert labels_of(manifest) == {
        "cat, wild/3.wav": ["cat, wild"],
        "dog/1.wav": ["dog"],
        "dog/more/2.flac": ["dog"],
    }
    with pytest.raises(UserError, match="one sub-folder"):
        read_manifest(touch(tmp_path / "flat", "1.wav"))


def test_ast_data_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "audio/b.wav")
    data = {
        "data": [
            {"wav": str(tmp_path / "a.wav"), "labels": "/m/1,/m/2", "source": "s"},
            {"wav": "b.wav", "labels": "/m/2", "source": " t "},
        ]
    }
    table = write(tmp_path / "train.json", json.dumps(data))
    manifest = read_manifest(table, group_by="source")
    assert labels_of(manifest) == {
        str(tmp_path / "a.wav"): ["/m/1", "/m/2"],
        "b.wav": ["/m/2"],
    }
    assert [entry.group for entry in manifest.good] == ["s", "t"]
    with pytest.raises(UserError, match="--group-by take: no such column"):
        read_manifest(table, group_by="take")


def test_clips_of_ast_are_counted_as_clips(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    data = [
        {"wav": "a.wav", "labels": "x", "fold": "1"},
        {"wav": "a.wav", "labels": "[nan]", "fold": "2"},
    ]
    table = write(tmp_path / "t.json", json.dumps({"data": data}))
    with pytest.raises(UserError, match=r"clip 2.*\[nan\]"):
        read_manifest(table)
    with pytest.raises(UserError, match="clip 1.*clip 2"):
        read_manifest(table, group_by="fold")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.csv", None, "no such file"),
        ("t.csv", "", "empty file"),
        ("t.csv", "path,labels\n", "no clips"),
        ("t.csv", "name,text\na,b\n", "expected AudioSet's segments or a header with path"),
        ("t.csv", "path,label,label\na.wav,x,y\n", "one column label, got 2"),
        ("t.csv", "a.wav,x\nb.wav,y\n", "header with path"),
        ("t.tsv", "audio/a.wav\t0.0\t1.5\tcar\n", "header with path"),
        ("t.csv", "path,labels\na.wav,x,y\n", "line 2: expected 2 cells, got 3"),
        ("t.csv", 'path,labels\na.wav,"x\n', "line 2: not CSV"),
        ("t.csv", "# YTID\nid0, 0, 10, a\nid1, zero, 10, a\n", "line 3: expected YTID"),
        ("t.csv", "id0, 0, 10, a\nid1, nan, inf, a\n", "line 2: expected YTID"),
        ("t.csv", "a" * 200_000, "not CSV"),
        ("t.json", "{", "not JSON"),
        ("t.json", '{"clips": []}', 'no list "data"'),
        ("t.json", '{"data": [{"wav": 3}]}', "clip 1: expected"),
        ("t.h5", "x", "--labels CSV or --classes-from SET names them"),
        ("t.csv", "\x00\udcff\udcfe", "not text"),
    ],
)
def test_wrong_tables(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    (tmp_path / "audio").mkdir()
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('index,mid,display_name\n0,/m/1,"A, b"\n1,/m/2,C\n', ["/m/1", "/m/2"]),
        ("index,mid,display_name\n1,/m/2,C\n0,/m/1,A\n", ["/m/1", "/m/2"]),
        ("\ufeffindex, id, name\n0, x, X\n", ["x"]),
        ("0,/m/1,A\n1,/m/2,C\n", ["/m/1", "/m/2"]),
        ("id,name\nb,B\na,A\n", ["b", "a"]),
        ("display_name\nDog\nCat\n", ["Dog", "Cat"]),
    ],
)
def test_class_lists(tmp_path: Path, text: str, ids: list[str]) -> None:
    classes = ClassList.from_csv(write(tmp_path / "c.csv", text))
    assert [c.id for c in classes.classes] == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "empty"),
        ("a,b\n1,2\n", "expected columns index, mid"),
        ("index,mid,display_name\n0,a,A\n0,b,B\n", "line 3: class 'b'"),
        ("index,mid,display_name\n0,a,A\n1,a,B\n", "line 3: class 'a'"),
        ("index,mid,display_name\n0,a,A\n2,b,B\n", "indices 0..1"),
        ("index,mid,display_name\nx,a,A\n", "line 2: expected a whole number"),
        ("index,mid,display_name\n0,a\n", "line 2: expected 3 cells"),
    ],
)
def test_wrong_class_lists(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.csv"
    if text is not None:
        write(path, text)
    with pytest.raises(UserError, match=message):
        ClassList.from_csv(path)


def test_names_of_classes_are_labels_too_unless_ambiguous() -> None:
    classes = ClassList([ClassInfo("a", "X"), ClassInfo("b", "X"), ClassInfo("X2", "a")], "here")
    assert classes.number("a") == 0  # the id, not the name of the third
    assert "X" not in classes
    assert classes.number("X2") == 2


def random_table(rng: np.random.Generator) -> tuple[list[str], list[tuple[int, ...]]]:
    num_clips, num_classes = int(rng.integers(20, 200)), int(rng.integers(2, 12))
    groups = [
        f"g{g}" for g in rng.integers(0, max(2, num_clips // int(rng.integers(1, 5))), num_clips)
    ]
    share = rng.dirichlet(np.full(num_classes, 0.5))
    labels = [
        tuple(sorted(set(rng.choice(num_classes, int(rng.integers(1, 4)), p=share).tolist())))
        for _ in range(num_clips)
    ]
    return groups, labels


def test_holdout_properties() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for case in range(150):
        groups, labels = random_table(rng)
        fraction = float(rng.choice([0.1, 0.2, 0.5]))
        held = holdout_mask(groups, labels, fraction, seed=case)
        assert np.array_equal(held, holdout_mask(groups, labels, fraction, seed=case))
        in_eval = {g for g, h in zip(groups, held, strict=True) if h}
        in_train = {g for g, h in zip(groups, held, strict=True) if not h}
        assert not in_eval & in_train
        train_groups: dict[int, set[str]] = {}
        for g, ks, h in zip(groups, labels, held, strict=True):
            for k in ks:
                train_groups.setdefault(k, set())
                if not h:
                    train_groups[k].add(g)
        assert all(train_groups.values())  # every class can still be trained
        of_group: dict[str, set[int]] = {}
        for g, ks in zip(groups, labels, strict=True):
            of_group.setdefault(g, set()).update(ks)
        for k in train_groups:
            if any(h and k in ks for h, ks in zip(held, labels, strict=True)):
                continue
            # Without an eval clip: each of its groups is the last of some class in training.
            movable = [
                g for g, ks in of_group.items()
                if k in ks and all(len(train_groups[c]) >= 2 for c in ks)
            ]  # fmt: skip
            assert not movable
        shares.append(held.mean() / fraction)
    # Groups are lumps and every class gets one, so small sets hold out more; on the whole it fits.
    assert 0.8 < np.median(shares) < 1.5


def test_holdout_is_stratified_and_seeded() -> None:
    rng = np.random.default_rng(1)
    labels = [(int(k),) for k in rng.choice(5, 5000, p=[0.6, 0.2, 0.1, 0.08, 0.02])]
    groups = [str(i) for i in range(len(labels))]
    held = holdout_mask(groups, labels, 0.1, seed=0)
    for k in range(5):
        of_class = np.array([k in ks for ks in labels])
        assert held[of_class].mean() == pytest.approx(0.1, abs=0.01)
    assert not np.array_equal(held, holdout_mask(groups, labels, 0.1, seed=1))


@pytest.mark.parametrize("text", ['{"data": ' + "[" * 100_000, '{"data": ' + "9" * 10_000 + "}"])
def test_json_that_python_does_not_read(tmp_path: Path, text: str) -> None:
    table = write(tmp_path / "ast.json", text)
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(table)


@pytest.mark.timeout(60)
def test_links_to_folders_around_them_are_not_followed(tmp_path: Path) -> None:
    """Two such links would be followed a trillion times."""
    root = touch(tmp_path / "sounds", "dog/a.wav", "cat/b.wav")
    aside = touch(tmp_path / "aside", "c.wav")
    (root / "dog" / "again").symlink_to(root)
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "self").symlink_to(".")
    (root / "bird").symlink_to(aside)
    (root / "puppy").symlink_to("dog")
    manifest = read_manifest(root)
    names = sorted(entry.name for entry in manifest.good)
    assert names == ["bird/c.wav", "cat/b.wav", "dog/a.wav", "puppy/a.wav"]
    table = write(tmp_path / "segments.csv", 'a, 0.0, 10.0, "/m/dog"\n')
    assert len(read_manifest(table, audio=root).good) == 1


def test_names_with_any_bytes(tmp_path: Path) -> None:
    """A pipe is no file; a name may hold a line end or bytes that are no text."""
    (tmp_path / "a").mkdir()
    odd = os.fsdecode(b"two\nlines \xff.wav")
    touch(tmp_path / "a", odd, "plain.wav")
    os.mkfifo(tmp_path / "a" / "pipe.wav")
    manifest = read_manifest(tmp_path)
    assert [entry.name for entry in manifest.good] == ["a/plain.wav", f"a/{odd}"]
    assert [(Path(bad.path).name, bad.reason) for bad in manifest.bad] == [("pipe.wav", "missing")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    touch(tmp_path, "a.wav")
    table, classes = tmp_path / "table.csv", tmp_path / "classes.csv"
    table.write_bytes("path,labels\na.wav,café\n".encode(encoding))
    classes.write_bytes("index,mid,display_name\n0,café,Café\n".encode(encoding))
    if encoding.startswith("utf-8"):
        manifest = read_manifest(table, labels=classes)
        assert labels_of(manifest) == {"a.wav": ["café"]}
        return
    for path, read in ((table, read_manifest), (classes, ClassList.from_csv)):
        with pytest.raises(UserError, match="UTF-16") as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_latin_1_is_named_with_its_line(tmp_path: Path, line_end: str) -> None:
    table, classes = tmp_path / "table.csv", tmp_path / "classes.csv"
    lines = ("path,labels", "a.wav,tea", "b.wav,café", "")
    table.write_bytes(line_end.join(lines).encode("latin-1"))
    lines = ("index,mid,display_name", "0,tea,Tea", "1,café,Café", "")
    classes.write_bytes(line_end.join(lines).encode("latin-1"))
    for path, read in ((table, read_manifest), (classes, ClassList.from_csv)):
        with pytest.raises(UserError, match=r"Latin-1.*0xE9.*line 3") as caught:
            read(path)
        assert str(path) in str(caught.value)

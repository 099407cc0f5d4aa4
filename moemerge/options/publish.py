"""Options of publish."""

from __future__ import annotations

from pydantic import Field

from moemerge.errors import OptionError
from moemerge.options.base import Options, Run, Source


class PublishSettings(Options):
    """Model card and push to the Hugging Face Hub."""

    repo: str | None = Field(None, description="owner/name on the hub; without it only the card is written")
    push: bool = Field(False, description="push; otherwise only write and show what would be pushed")
    public: bool = Field(False, description="make the repository public")
    license: str | None = Field(
        None, description="licence id for the card (default: taken from the dense model)"
    )
    datasets: list[str] = Field(default_factory=list, description="dataset ids for the card")
    base_model: str | None = Field(None, description="hub name of the dense model for the card")

    def missing_repo(self, section: str = "") -> OptionError | None:
        """The fault of a push without a repository, if this is one; `section` stands before option names."""
        if not self.push or self.repo is not None:
            return None
        return OptionError(
            "push without a repository",
            given=f"{section}push true, and no repository",
            expected=f"{section}repo",
            fix=f"set {section}repo: OWNER/NAME",
        )


class Publish(PublishSettings, Run):
    """Options of `moemerge publish`."""

    POSITIONAL = ("model", "evaluation")

    model: Source = Field(description="folder with a model, written by merge, train, upcycle or export")
    evaluation: Source | None = Field(None, description="folder written by evaluate, for the card")
    endpoint: str | None = Field(None, description="another hub's address (default: huggingface.co)")
    yes: bool = Field(False, description="confirm the push; without it, push shows what would be sent")

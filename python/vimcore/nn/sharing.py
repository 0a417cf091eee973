# SPDX-License-Identifier: Apache-2.0
"""Networks in folders and on a hub, under the names of huggingface_hub's `PyTorchModelHubMixin`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..hub.repository import WEIGHTS, locate, upload, write_beside
from . import saving
from .base import NetworkBase

Shared = TypeVar("Shared", bound="SharedNetwork")


class SharedNetwork(NetworkBase):
    """`from_pretrained`, `save_pretrained` and `push_to_hub`."""

    def save(
        self,
        path: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Writes a vimcore file."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Shared],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
        dynamic_img_size: bool = False,
    ) -> Shared:
        """The network of a folder or repository, in eval mode; see `VisionMamba.load` for its last options.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, OWNER/NAME of a
                repository, or a vimcore file. What huggingface_hub's `PyTorchModelHubMixin` wrote is read as
                well.
            force_download, token, cache_dir, local_files_only, revision: as of `hf_hub_download`.

        Raises:
            OSError, ValueError, vimcore.Error: the folder or file holds no such network.
            RuntimeError: the download fails: no connection, no access, no such repository, a package is
                missing; says the remedy.
        """
        path, options = locate(
            pretrained_model_name_or_path,
            force=force_download,
            token=token,
            cache_dir=cache_dir,
            local_only=local_files_only,
            revision=revision,
        )
        if options is None:
            return saving.load_as(cls, path, img_size, device, dynamic_img_size=dynamic_img_size)
        if img_size is not None:
            raise ValueError(
                f"{path}: img_size: tensors without vimcore's metadata are read as they are; save the "
                "network with save_pretrained first"
            )
        model = cls._of_config(options)
        saving.load_checkpoint(model, path)
        model.dynamic_img_size = dynamic_img_size
        return model.eval().to(device)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes a folder: model.safetensors as `VisionMamba.save` does, config.json, and a model card.

        A README.md that is there is left as it is. timm reads the folder as "local-dir:FOLDER".

        Args:
            config: further keys of config.json.
            repo_id: OWNER/NAME, for the card's text and `push_to_hub`; None: the folder's name.
            model_card_kwargs: license, datasets, base_model, language, tags, description, and metrics (names
                with numbers).
            labels, dtype: see `VisionMamba.save`.
            push_to_hub_kwargs: further arguments of `push_to_hub`.

        Returns:
            the address of the commit with `push_to_hub`, else None.

        Raises:
            ValueError: the file could not describe the network, or an option is another.
        """
        folder = Path(save_directory)
        if push_to_hub_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: {', '.join(push_to_hub_kwargs)}: only with push_to_hub=True")
        repo = repo_id or folder.resolve().name
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / WEIGHTS, labels, dtype)
        write_beside(folder, repo, model_card_kwargs, config)
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo,
            config=config,
            model_card_kwargs=model_card_kwargs,
            labels=labels,
            dtype=dtype,
            **push_to_hub_kwargs,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Mapping[str, Any] | None = None,
        commit_message: str = "Push model using vimcore",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: Sequence[str] | str | None = None,
        ignore_patterns: Sequence[str] | str | None = None,
        delete_patterns: Sequence[str] | str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> str:
        """Puts what `save_pretrained` writes into a repository, which is made where there is none.

        A README.md that is there is left as it is, unless there are model_card_kwargs.

        Args:
            repo_id: OWNER/NAME, or NAME under who is logged in.
            commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns,
                delete_patterns: as of `PyTorchModelHubMixin.push_to_hub`.
            config, model_card_kwargs, labels, dtype: see `save_pretrained`.

        Returns:
            the address of the commit.

        Raises:
            RuntimeError: nobody is logged in, the hub refuses or is not reached, huggingface_hub is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder,
                config=config,
                repo_id=repo_id,
                model_card_kwargs=model_card_kwargs,
                labels=labels,
                dtype=dtype,
            )
            return upload(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                keep_card=model_card_kwargs is None,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )

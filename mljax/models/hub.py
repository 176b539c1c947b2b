"""`hf://OWNER/NAME`: weights of the Hugging Face hub, where timm's are."""

from pathlib import Path

from mljax.errors import PIP, UserError

PREFIX = "hf://"
FILE = "model.safetensors"
_SECONDS = 10  # to find out whether the hub answers


def fetch(name: str) -> Path:
    """The local copy of `model.safetensors` of a repository, downloaded once.

    Args:
        name: for example "hf://timm/mobilenetv3_large_100.miil_in21k".

    Raises:
        UserError: the name is not of this form, huggingface_hub is not installed, or
            the file is not in its cache and cannot be downloaded now.
    """
    repository = name.removeprefix(PREFIX)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(
            f"{name}: must be hf://OWNER/NAME, like hf://timm/tf_efficientnetv2_s.in21k"
        )
    elsewhere = (
        f"or download {FILE} of the repository {repository} in a browser and give its "
        f"path instead (--config.init_from=FOLDER/{FILE})"
    )
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name}: needs huggingface_hub; {PIP} huggingface_hub, {elsewhere}"
        ) from error
    try:
        return Path(
            huggingface_hub.hf_hub_download(repository, FILE, local_files_only=True)
        )
    except Exception:  # not in the cache; its types differ between versions
        pass
    try:
        # Asks once: the download itself tries again for half a minute.
        url = huggingface_hub.hf_hub_url(repository, FILE)
        huggingface_hub.get_hf_file_metadata(url, timeout=_SECONDS)
        return Path(huggingface_hub.hf_hub_download(repository, FILE))
    except Exception as error:  # no network, no such repository, a full disk, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: cannot be downloaded ({type(error).__name__}: {reason}); try "
            f"again where the hub can be reached, {elsewhere}"
        ) from error

"""What MindSpore can run on here. Imports MindSpore only when asked, so light modules may import this one."""

from __future__ import annotations


def device_available() -> bool:
    """Whether MindSpore finds an Ascend device. Never raises and changes no setting of the process."""
    return ascend_problem() is None


def ascend_problem() -> str | None:
    """None if MindSpore finds an Ascend device, else the reason why not, in one line.

    MindSpore loads its device plugins when it is imported and remembers the result, so asking costs
    microseconds after the import. ``mindspore.device_context.ascend.is_available`` asks the same, but logs
    warnings where the answer is no.
    """
    try:
        from mindspore import hal
        from mindspore._c_expression import MSContext

        context = MSContext.get_instance()
        if not context.is_pkg_support_device("Ascend"):
            return _first_line(context.load_plugin_error()) or "this MindSpore package has no Ascend plugin"
        if int(hal.device_count("Ascend")) < 1:
            return "the Ascend plugin is loaded, but no device is visible"
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        return _first_line(str(error)) or type(error).__name__
    return None


def ascend_soc() -> str:
    """Name of the Ascend chip in lower case (``ascend910``, ``ascend910b``, ...), empty if there is none."""
    if not device_available():
        return ""
    from mindspore._c_expression import MSContext

    return str(MSContext.get_instance().get_ascend_soc_version()).lower()


def _first_line(text: str) -> str:
    """The first sentence of a message of several lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""


def resolve_device(device: str) -> str:
    """``auto`` as the device that is there, ascend or cpu; other names as they are."""
    if device != "auto":
        return device
    return "ascend" if device_available() else "cpu"

"""What `oats-vision bench` times; light, since the command line reads it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Load(BaseModel):
    """Pictures in a batch, tokens of a prompt, and tokens to generate after one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(
        (1, 16), min_length=1, description="pictures in a batch; may be repeated"
    )
    prompt: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = Field(
        (128,), min_length=1, description="tokens of a prompt (text); may be repeated"
    )
    new_tokens: int = Field(32, ge=1, description="tokens to generate (text)")
    repeats: int = Field(7, ge=1, description="repeats of each measurement; medians are shown")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads [default: PyTorch's own]")

"""What a run reads, and how: settings that a task takes its data by."""

from pydantic import BaseModel, ConfigDict, Field


class DataOptions(BaseModel):
    """The model's name and its data, for calibration and for evaluation; what is left out is the task's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field("demo", description="alias, timm name, hf:org/name, hub:entry, a folder or a .gguf file")
    data: str | None = Field(
        None,
        min_length=1,
        description="folder of pictures, .txt, .jsonl, hf:name[:config], c4, wikitext, fineweb, demo "
        "[default: demo for the model demo]",
    )
    split: str = Field("train", description="split of a Hugging Face dataset")
    eval: bool = Field(True, description="measure what it cost")
    eval_data: str | None = Field(
        None, min_length=1, description="labelled pictures for top-1, or text for perplexity, before and after"
    )
    eval_split: str | None = Field(
        None, description="split of a Hugging Face dataset [default: validation; test for text]"
    )
    eval_samples: int | None = Field(None, ge=1, description="pictures, or windows of text [default: all]")
    streaming: bool = Field(False, description="stream Hugging Face datasets: no download")
    samples: int | None = Field(None, ge=1, description="pictures, or sequences of text [default: 2048; 128 for text]")
    batch_size: int | None = Field(None, ge=1, description="pictures or sequences at a time [default: 64; 4 for text]")
    sequence_length: int = Field(2048, ge=2, description="tokens in a sequence (text)")
    workers: int = Field(0, ge=0, description="processes that read pictures")
    seed: int = Field(42, ge=0, lt=1 << 63, description="seed for choosing the calibration data")

"""The two text encoders and the VAE's encoder, described by the files that they lie in. load() makes them compute.

Nothing here imports torch, so that a precompute that finds nothing missing ends within a second.
"""

from data.common.imports import lean
from data.models.files import dtype_name
from data.models.identity import fingerprint

CHUNK = 75  # tokens of a text that CLIP reads at once


class TextEncoders:
    """Both CLIPs as SDXL uses them, or as kohya's tools read captions that are longer than CLIP's 75 tokens.

    chunks        of 75 tokens that are read of a caption, each on its own
    text_shape    of a caption's penultimate hidden states of both, side by side: (2 + 75 chunks, 768 + 1280)
    pooled_shape  of the projected output of the second one: (1280,)
    """

    def __init__(self, model, precision, max_token_length=CHUNK):
        self.model, self.precision, self.chunks = model, precision, max_token_length // CHUNK
        self.tokenizer_components = [model.component(name) for name in ("tokenizer", "tokenizer_2")]
        self.encoder_components = [model.component(name) for name in ("text_encoder", "text_encoder_2")]
        configs = [component.config() for component in self.encoder_components]
        self.text_shape = (2 + CHUNK * self.chunks, sum(config["hidden_size"] for config in configs))
        self.pooled_shape = (configs[1]["projection_dim"],)

    def fingerprint(self, identities):
        """What an embedding depends on besides its caption. identities: of the model's components, by name."""
        parts = self.tokenizer_components + self.encoder_components
        longer = [f"{self.chunks}chunks"] if self.chunks > 1 else []
        return "-".join([*(fingerprint(identities[part.name]) for part in parts), self.precision, *longer])

    def load(self, device):
        """-> LoadedTextEncoders. Raises UserError when they cannot tell two captions apart."""
        with lean():
            from data.loaded import LoadedTextEncoders

        return LoadedTextEncoders(self, device)


class VAE:
    """The encoder half of the VAE: pixels -> posteriors, the mean and standard deviation of every latent."""

    def __init__(self, model, precision):
        self.model, self.component = model, model.component("vae")
        self.config = self.component.config()
        # SDXL's own VAE overflows in fp16, and its config says so; the fp16-fix one's says that it does not
        self.precision = "no" if precision == "fp16" and self.config["force_upcast"] else precision

    def fingerprint(self, identities):
        """What a posterior depends on besides its picture. identities: of the model's components, by name."""
        return f"{fingerprint(identities['vae'])}-torch.{dtype_name(self.precision)}"

    def posterior_shape(self, bucket):
        """(height, width) in pixels -> the shape of a posterior, (2, 4, h, w)."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return (2, self.config["latent_channels"], bucket[0] // factor, bucket[1] // factor)

    def load(self, device):
        """-> LoadedVAE"""
        with lean():
            from data.loaded import LoadedVAE

        return LoadedVAE(self, device)

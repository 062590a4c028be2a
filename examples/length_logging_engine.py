# examples/length_logging_engine.py: an engine of your own, here around one of the package's
import logging

from transformers import PreTrainedModel

from remax_lightning import AutoEngine, GenerationOutput, GenerationRequest


class LengthLoggingEngine(AutoEngine):
    def generate(self, model: PreTrainedModel, request: GenerationRequest) -> GenerationOutput:
        output = super().generate(model, request)
        ends = (output.sampled_ids == request.eos_ids[0]).any(-1).float().mean()
        logging.info("%.0f %% of the sampled responses ended with EOS", 100 * float(ends))
        return output

"""Bridges to PEFT, transformers, bitsandbytes and ONNX Runtime; each is imported only where it is used."""

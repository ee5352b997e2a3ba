"""Ways out besides timm's own folder: one program (ONNX, torch.export), or a folder of transformers."""

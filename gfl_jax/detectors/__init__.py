"""The five choices put together: raw outputs to losses, raw outputs to detections."""

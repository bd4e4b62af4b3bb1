"""HSADML on brain-tumour slices: classify meningioma, glioma and pituitary tumour by angle."""

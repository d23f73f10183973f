"""The live page: blocks seen while they are denoised. gradio is imported when the page is built, and only there."""

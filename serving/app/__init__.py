"""The page in the browser: mark regions of a picture, see all captions appear at once, ask, take home."""

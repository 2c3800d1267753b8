"""models made smaller: which type each tensor takes, and the GGUF file that holds the result"""

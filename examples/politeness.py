# examples/politeness.py: a reward as a function, one number per response
def politeness(prompts, responses, rows, word="please"):
    return [float(word in response.lower()) for response in responses]

"""Plain small talk by nobody in particular, written for this file: what a person's adapter should leave as it
was. The loss on it with an adapter, less the loss without, is the adapter's drift."""

from datetime import UTC, datetime, timedelta

from personalization.history import Turn
from personalization.prompt import Example, Renderer

# Each conversation in turns of user and assistant, the user first.
CONVERSATIONS = (
    (
        "Good morning. Did it rain at your place last night?",
        "It did, quite a lot. The street was still wet when I went out for bread.",
        "Here it stayed dry, but the wind was so strong that the bins fell over.",
        "I heard the wind too. It should calm down by the afternoon.",
        "That would be nice. I wanted to hang the washing outside.",
        "Wait until two or three. The sun should be out by then.",
    ),
    (
        "What are you cooking tonight?",
        "A vegetable soup, I think. There are carrots and leeks that have to be used.",
        "Do you put potatoes in it?",
        "Two or three, cut small. They make it thicker.",
        "I always forget the salt until the very end.",
        "It is better to add a little at the start and taste again later.",
    ),
    (
        "How do I get from the station to the museum?",
        "Leave by the north exit and follow the main street for about ten minutes.",
        "Is there a bus as well?",
        "Yes, number four stops in front of the station and goes past the museum.",
        "Which one would you take?",
        "On a day like this I would walk. The way along the river is the nicest.",
    ),
    (
        "I finished the book you gave me.",
        "Already? What did you think of the ending?",
        "I did not expect it. For a long time I was sure that the sister had done it.",
        "So was I. I had to go back and read the letter in the third chapter again.",
        "Do you have another one by the same writer?",
        "There is one about a lighthouse. It is shorter, and a little sad.",
    ),
    (
        "My computer has become very slow.",
        "Since when? Did you install anything new?",
        "Since last week. I only updated the browser.",
        "Then look at how much space is left on the disk. A full disk makes everything slow.",
        "There are only two gigabytes left.",
        "That is the reason, most likely. Empty the downloads folder and start it again.",
    ),
    (
        "Are you coming to the party on Saturday?",
        "I would like to, but my parents are visiting that weekend.",
        "Bring them along. There will be enough food for everyone.",
        "That is kind of you. My father tells long stories, be warned.",
        "I like long stories. We start at six.",
        "Then we will be there at half past, with a cake.",
    ),
    (
        "What is the tallest mountain you have climbed?",
        "It was not very tall, about two thousand meters, but the path was steep.",
        "How long did it take you?",
        "Four hours up and three down. We had left before sunrise to avoid the heat.",
        "Was the view worth it?",
        "You could see three lakes and, far away, the sea.",
    ),
    (
        "I am thinking about getting a cat.",
        "Have you had one before?",
        "When I was a child. She slept on my bed every night.",
        "A cat needs less time than a dog, but somebody has to be there in your holidays.",
        "My neighbor offered to look after it.",
        "Then there is nothing in the way. The shelter is open on weekdays until five.",
    ),
    (
        "The meeting was moved to Thursday.",
        "To the same time?",
        "No, an hour later, at eleven. The room stays the same.",
        "I will tell the others. Do we need the figures of last month?",
        "Yes, please print them. The projector is still broken.",
        "I will make eight copies, and one to spare.",
    ),
    (
        "Can you explain why leaves turn red in autumn?",
        "The green color goes away when the days get short, and other colors become visible.",
        "So the red was there all the time?",
        "The yellow was. Most of the red is made anew, from the sugar that stays in the leaf.",
        "And why do the leaves fall?",
        "The tree closes them off to save water in winter. Then the wind does the rest.",
    ),
)


def neutral_rows(renderer: Renderer) -> list[Example]:
    """One row for each conversation, all of its turns to be predicted. The same for everyone, always."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    rows = []
    for number, conversation in enumerate(CONVERSATIONS):
        turns = [
            Turn(
                id=f"neutral-{number}-{place}",
                conversation=f"neutral-{number}",
                at=begin + timedelta(hours=number, seconds=place),
                role="assistant" if place % 2 else "user",
                text=text,
                author="person",
            )
            for place, text in enumerate(conversation)
        ]
        rows.append(renderer.example(turns))
    return rows

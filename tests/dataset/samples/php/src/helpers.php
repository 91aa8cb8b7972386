<?php

function title(string $text): string
{
    return ucfirst(trim($text));
}
